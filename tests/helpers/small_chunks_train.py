"""Run cmtrain with chunks of 16 KiB, so that a small data set from a bucket has many of them."""

import sys

from cmtrain.cli.main import main
from pipelines.files import mirror

mirror.CHUNK_BYTES = 1 << 14

if __name__ == "__main__":
    sys.exit(main())
