"""Run cmtrain as on a GPU whose decoder crashes with windows and hangs without; it trains on the CPU."""

import sys
from dataclasses import replace

import cmtrain.training.loaders
from cmtrain.cli.main import main
from helpers.decoder_probes import program
from pipelines.decoder_probe import choose_decode, fault_of
from pipelines.spec import Placement


def probe(place, decode):
    fault = {"mixed": "crash", "mixed_whole": "hang"}[decode]
    return fault_of(place, decode, max_seconds=2, program=program(fault))


def place_loaders(config, accelerator, control=None):
    place, _ = original(config, accelerator, control)
    decode, lines = choose_decode(Placement(device="cuda:0"), probe)
    return replace(place, decode=decode), lines


original, cmtrain.training.loaders.place_loaders = cmtrain.training.loaders.place_loaders, place_loaders
sys.exit(main())
