"""Parse what a person types: verbs, options, help and exit codes. Loads no torch."""

import sys

from cmtrain.errors import EXIT_DATA, check_pipelines

try:
    check_pipelines()
except ImportError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(EXIT_DATA)
