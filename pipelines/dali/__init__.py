"""Build the DALI graphs. The only folder that imports DALI."""
