"""Pack image folders into tar shards."""
