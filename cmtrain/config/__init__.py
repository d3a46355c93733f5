"""Read the configuration: every key, its limits, and every mistake with its line."""
