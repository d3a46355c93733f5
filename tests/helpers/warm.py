"""Prepare a process that others are forked from: load and compile what every run loads and compiles.

DALI rewrites the Python of a graph with branches, and jinja compiles the report's templates: half of a small
run's time. Both keep the result as long as the process lives. No graph is built here: that would start
threads, and a fork has only one.
"""

import threading
from contextlib import suppress

import cmtrain.cli.main
import cmtrain.training.train  # noqa: F401
from cmtrain.monitoring.report.rendering import make_templates


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


for name in make_templates().list_templates():
    make_templates().get_template(name)
# A module that is preloaded may be missing, as DALI may be; ours would end the server with a DataError.
with suppress(ImportError):
    convert_graphs()
assert threading.active_count() == 1
