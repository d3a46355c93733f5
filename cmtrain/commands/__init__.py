"""Run every verb but train, one file per verb."""
