"""Take one optimizer step. Knows no file, no screen and no configuration."""
