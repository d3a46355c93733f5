"""Run cmtrain with a fault: at some steps, on one rank, every image becomes inf, or the loss a large number.

Environment: POISON_STEPS (comma-separated, from 0), POISON_RANK, POISON_LOSS (a factor for the loss; without
it the images are inf). Everything else is the program itself.
"""

import os
import sys

import cmtrain.step.learner
from cmtrain.cli.main import main

STEPS = {int(step) for step in os.environ["POISON_STEPS"].split(",")}
mix = cmtrain.step.learner.mix


def poisoned_mix(images, labels, spec, key):
    images, targets = mix(images, labels, spec, key)
    if key[1] in STEPS and os.environ.get("RANK", "0") == os.environ["POISON_RANK"]:
        if "POISON_LOSS" in os.environ:
            return images, targets * float(os.environ["POISON_LOSS"])
        images = images * float("inf")
    return images, targets


cmtrain.step.learner.mix = poisoned_mix
sys.exit(main())
