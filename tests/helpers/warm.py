"""Prepare a process that others are forked from: loads what a run loads, and lets DALI convert its graphs.

DALI rewrites the Python of every graph with branches, which takes half of a small run's time. What it has
rewritten is kept for the life of the process. No graph is built here: that would start threads, and a fork
has only one.
"""

import threading
from contextlib import suppress

import cmtrain.cli.main
import cmtrain.training.train  # noqa: F401


def convert_graphs() -> None:
    import nvidia.dali.plugin.pytorch  # noqa: F401
    from nvidia.dali.pipeline import Pipeline

    from pipelines.dali import graphs
    from pipelines.spec import AugmentSpec, EvalSpec

    run = graphs.Execution("cpu", "cpu", None, 1, 1, 1)
    build, Pipeline.build = Pipeline.build, lambda pipeline: None
    try:
        for spec in (AugmentSpec(32, color_jitter=0.2, rand_augment="3a"), EvalSpec(32, 36)):
            graphs.finish_graph(lambda: [], lambda: [], spec, run)
    finally:
        Pipeline.build = build


# A module that is preloaded may be missing, as DALI may be; ours would end the server with a DataError.
with suppress(ImportError):
    convert_graphs()
assert threading.active_count() == 1
