"""cmtrain in fp16 with a loss scaler on a CPU; everything else is the program itself."""

import sys

from helpers.half import HalfAccelerator

import cmtrain.training.build
from cmtrain.cli.main import main

cmtrain.training.build.make_accelerator = lambda *_, **__: HalfAccelerator()
sys.exit(main())
