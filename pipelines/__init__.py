"""JPEG files to batches on the device. Imports numpy, torch and DALI; never cmtrain, never torch.distributed."""
