"""Run a training from its configuration to the last line of status.json."""
