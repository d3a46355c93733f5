"""Find the image files, read their headers and remember both."""
