"""Parse what a person types: verbs, options, help and exit codes. Loads no torch."""
