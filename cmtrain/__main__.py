"""`python -m cmtrain`, which is what `accelerate launch -m cmtrain` and torchrun start."""

import sys

from cmtrain.cli.main import main

sys.exit(main())
