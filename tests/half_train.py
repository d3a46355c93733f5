"""cmtrain in fp16 with a loss scaler on a CPU; everything else is the program itself."""

import sys

from half import HalfAccelerator

import cmtrain.build
from cmtrain.cli import main

cmtrain.build.make_accelerator = lambda *_, **__: HalfAccelerator()
sys.exit(main())
