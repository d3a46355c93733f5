"""Turn image files into batches on the device. Imports neither cmtrain nor torch.distributed."""
