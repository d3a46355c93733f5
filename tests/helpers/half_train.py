"""Run cmtrain in fp16 with a loss scaler on a CPU; everything else is the program itself."""

import sys

import cmtrain.training.build
from cmtrain.cli.main import main
from helpers.half import HalfAccelerator

cmtrain.training.build.make_accelerator = lambda *_, **__: HalfAccelerator()
sys.exit(main())
