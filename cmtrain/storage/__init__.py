"""Write and read everything a run keeps on disk."""
