"""cmtrain with a fault: at one step, on one rank, every image of the batch becomes inf.

Environment: POISON_STEPS (comma-separated, from 0), POISON_RANK. Everything else is the program itself.
"""

import os
import sys

import cmtrain.learner
from cmtrain.cli import main

STEPS = {int(step) for step in os.environ["POISON_STEPS"].split(",")}
mix = cmtrain.learner.mix


def poisoned_mix(images, labels, spec, key):
    images, targets = mix(images, labels, spec, key)
    if key[1] in STEPS and os.environ.get("RANK", "0") == os.environ["POISON_RANK"]:
        images = images * float("inf")
    return images, targets


cmtrain.learner.mix = poisoned_mix
sys.exit(main())
