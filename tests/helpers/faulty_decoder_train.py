"""Run cmtrain as on a GPU whose decoder crashes with windows and hangs without; it trains on the CPU."""

import sys
from dataclasses import replace

import cmtrain.training.loaders
from cmtrain.cli.main import main
from helpers.decoder_probes import program
from pipelines import decoder_probe
from pipelines.decoder_probe import fault_of
from pipelines.spec import Placement


def probe(place, decode):
    decoder_probe._COMMAND = program({"mixed": "crash", "mixed_whole": "hang"}[decode])
    return fault_of(place, decode, max_seconds=2)


def place_loaders(config, accelerator, control=None):
    place, _ = original(config, accelerator, control)
    decode, lines = decoder_probe.choose_decode(Placement(device="cuda:0"))
    return replace(place, decode=decode), lines


decoder_probe.fault_of = probe
original, cmtrain.training.loaders.place_loaders = cmtrain.training.loaders.place_loaders, place_loaders
sys.exit(main())
