"""The error that is the user's to fix in a configuration or on the command line, and every exit code."""

EXIT_DONE, EXIT_ERROR, EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, EXIT_EXPECTATION = 0, 1, 2, 3, 4, 5
EXIT_INTERRUPTED, EXIT_PREEMPTED = 130, 143


class ConfigError(Exception):
    """What was asked for cannot be done. str() is one line per mistake, each saying where and what instead.

    The program ends with exit code 2. Missing or broken data is pipelines.spec.DataError instead, exit code 3.
    """
