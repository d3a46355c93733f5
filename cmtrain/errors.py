"""The error that is the user's to fix in a configuration or on the command line."""


class ConfigError(Exception):
    """What was asked for cannot be done. str() is one line per mistake, each saying where and what instead.

    The program ends with exit code 2. Missing or broken data is pipelines.spec.DataError instead, exit code 3.
    """
