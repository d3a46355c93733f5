"""The graphs for a GPU keep DALI's rules on devices, for every recipe; checked without a GPU."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.graph_devices import define
from helpers.runs import ROOT
from nvidia.dali import fn, pipeline_def, types

from cmtrain.config.load import load_config
from cmtrain.training import loaders
from pipelines.dali import augment, graphs
from pipelines.spec import AugmentSpec, EvalSpec

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DECODERS = typing.get_args(typing.get_type_hints(graphs.Execution)["decode"])
FILES = [True, False] if graphs.READS_FILES else [False]


def nothing() -> list:
    raise AssertionError("a graph that is only defined asks for no input")


def specs(path: Path) -> tuple[AugmentSpec, EvalSpec]:
    """Return the transforms of a recipe. What changes only numbers, and no operator, is the same for all."""
    config = load_config(path).config
    given = loaders.augment_spec(config, SimpleNamespace(mixed_precision="no"))
    jitter = 0.4 if given.color_jitter else None
    train = AugmentSpec(32, given.interpolation, color_jitter=jitter, rand_augment=given.rand_augment)
    return train, EvalSpec(32, 36, config.data.eval_interpolation)


TRANSFORMS = {specs(path): path.relative_to(ROOT).as_posix() for path in CONFIGS}
# Policies that may be asked for on the command line, too.
TRANSFORMS |= {
    (AugmentSpec(32, rand_augment=policy, color_jitter=0.4), EvalSpec(32, 36)): policy
    for policy in ("rand-m9-mstd0.5-inc1", "reimpl", "3a", "dali-n2-m9")
}


def execution(decode: str, reads_files: bool) -> graphs.Execution:
    load = None if decode == "cpu" else 0.5
    return graphs.Execution("gpu", decode, 0, 8, 4, 2, reads_files=reads_files, hw_decoder_load=load)


def decoders(devices) -> list[str]:
    return [device for name, device in devices.operators if name.startswith("decoders__")]


@pytest.mark.parametrize("reads_files", FILES)
@pytest.mark.parametrize("decode", DECODERS)
def test_every_recipe_keeps_the_rules_on_devices(decode, reads_files, figure):
    run = execution(decode, reads_files)
    checked = 0
    for given, name in TRANSFORMS.items():
        spec, eval_spec = (dataclasses.replace(each, fp16=not reads_files) for each in given)
        whole = {
            "train": define(graphs.file_graph, nothing, spec, run),
            "eval": define(graphs.file_graph, nothing, eval_spec, run),
        }
        finish = {
            "finish": define(graphs.finish_graph, nothing, nothing, spec, run),
            "finish eval": define(graphs.finish_graph, nothing, nothing, eval_spec, run),
        }
        faults = {key: graph.faults for key, graph in (whole | finish).items() if graph.faults}
        assert not faults, (name, faults)
        assert [graph.output for graph in whole.values()] == ["gpu", "gpu"]
        assert [decoders(graph) for graph in whole.values()] == [[decode.partition("_")[0]]] * 2
        checked += sum(len(graph.operators) for graph in (whole | finish).values())
    figure(
        f"{decode}, {'files' if reads_files else 'bytes'}: {len(TRANSFORMS)} transforms, {checked} operators"
    )


@pytest.mark.parametrize(("recipe", "most"), [("full_in1k", 116), ("paper/cmt_ti", 89)])
def test_operators_on_a_gpu_are_few(recipe, most):
    """Each is a launch or more. What splits and joins a batch for a branch copies no image."""
    config = load_config(ROOT / "configs" / f"{recipe}.yaml").config
    spec = loaders.augment_spec(config, SimpleNamespace(mixed_precision="fp16"))
    operators = define(graphs.file_graph, nothing, spec, execution("mixed", graphs.READS_FILES)).operators
    names = [name for name, device in operators if device == "gpu" and "conditional" not in name]
    assert len(names) <= most, Counter(names)


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("reads_files", FILES)
@pytest.mark.parametrize("decode", DECODERS)
def test_decoding_alone_keeps_the_rules_on_devices(decode, reads_files, windows):
    graph = define(graphs.decode_graph, nothing, execution(decode, reads_files), windows=windows)
    assert graph.faults == []
    assert graph.output == "gpu"
    assert decoders(graph) == [decode.partition("_")[0]]


def test_an_operator_for_a_cpu_in_a_graph_for_a_gpu_is_reported(monkeypatch):
    """Contrast takes another way on a CPU; on a GPU a named argument of it would come from the GPU."""
    monkeypatch.setattr(augment, "on_gpu", lambda image: False)
    spec = AugmentSpec(32, rand_augment="reimpl", color_jitter=0.4)
    graph = define(graphs.file_graph, nothing, spec, execution("mixed", False))
    assert any("argument contrast_center is on the gpu" in fault for fault in graph.faults), graph.faults


WINDOW = {"shape": [8, 8], "axes": [0, 1]}
ENDINGS = {
    "right": (lambda image, top_left: fn.slice(image, start=top_left, **WINDOW), None),
    "slice, start on the gpu": (
        lambda image, top_left: fn.slice(image, start=top_left.gpu(), **WINDOW),
        "slice: argument start is on the gpu",
    ),
    "normalise by a mean on the gpu": (
        lambda image, top_left: fn.crop_mirror_normalize(image, mean=fn.reductions.mean(image)),
        "mirror_?normalize: argument mean is on the gpu",
    ),
    "resize on the gpu, then crop on the cpu": (
        lambda image, top_left: fn.crop(fn.resize(image, size=[8, 8]), crop=[4, 4], device="cpu"),
        "cannot be defined: .*(cpu operator|device='cpu')",
    ),
    "no such backend": (lambda image, top_left: fn.copy(top_left, device="mixed"), "no mixed backend"),
    "decoder that is wholly on the gpu": (
        lambda image, top_left: fn.decoders.image(top_left, device="gpu"),
        "cannot be defined: .*gpu operator|no gpu backend",
    ),
    "decoder fed on the gpu": (
        lambda image, top_left: fn.decoders.image(top_left.gpu(), device="mixed"),
        "cannot be defined: .*mixed operator|an input is on the gpu, the operator is mixed",
    ),
    "unknown argument": (lambda image, top_left: fn.resize(image, sise=[8, 8]), "cannot be defined: .*sise"),
    "missing argument": (lambda image, top_left: fn.cast(image), "cannot be defined: .*dtype"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_wrong_graph_is_reported(name):
    """Decode on the GPU, then do something that DALI would refuse when it builds the graph."""
    ending, words = ENDINGS[name]

    @pipeline_def(batch_size=2, num_threads=1, device_id=0)
    def graph():
        files, top_left = (
            fn.external_source(nothing, dtype=kind, ndim=1) for kind in (types.UINT8, types.INT32)
        )
        return ending(fn.decoders.image(files, device="mixed"), top_left)

    faults = define(graph).faults
    assert (faults == []) if words is None else any(re.search(words, fault, re.I) for fault in faults), (
        faults
    )
