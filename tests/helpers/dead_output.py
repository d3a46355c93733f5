"""Run cmtrain with stdout and stderr that OUTPUT names: pipe (its reader is gone), closed, or a file."""

import os
import sys

where = os.environ["OUTPUT"]
if where == "pipe":
    reader, descriptor = os.pipe()
    os.close(reader)
elif where != "closed":
    descriptor = os.open(where, os.O_WRONLY)
for number in (1, 2):
    if where == "closed":
        os.close(number)
    else:
        os.dup2(descriptor, number)

from cmtrain.cli.main import main  # noqa: E402

sys.exit(main())
