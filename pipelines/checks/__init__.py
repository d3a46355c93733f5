"""Check whether an image file can be decoded."""
