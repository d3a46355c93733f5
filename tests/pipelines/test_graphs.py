"""The configuration of decoding reaches DALI; a graph for a GPU can be defined without one."""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.photographs import write_folder
from helpers.runs import HANG_SECONDS
from nvidia.dali import fn

from cmtrain.config.load import load_config
from cmtrain.processes import collectives
from cmtrain.training import build, loaders
from pipelines.dali import graphs
from pipelines.files.manifest import Manifest
from pipelines.loader import file_reader
from pipelines.spec import AugmentSpec, DataError, Placement


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return Manifest.from_folder(write_folder(tmp_path / "in", 12), cache_dir=tmp_path / "cache")


@pytest.fixture(autouse=True)
def sound_gpu(monkeypatch):
    """No GPU is there to be tried."""
    monkeypatch.setattr("pipelines.decoder_probe.fault_of", lambda *_: "")


@pytest.fixture
def decoders(monkeypatch) -> list[dict]:
    """The arguments of every decoder in graphs that are defined, but not built."""
    seen: list[dict] = []
    monkeypatch.setattr("nvidia.dali.pipeline.Pipeline.build", lambda self: None)
    for name in ("image", "image_slice"):
        original = getattr(fn.decoders, name)

        def spy(*args, _original=original, **options):
            seen.append(options)
            return _original(*args, **options)

        monkeypatch.setattr(fn.decoders, name, functools.wraps(original)(spy))
    return seen


def make_loaders(manifest: Manifest, device: str, *overrides: tuple[str, str]) -> list:
    config = load_config("configs/demo.yaml", [("train.global_batch_size", "12"), *overrides]).config
    schedule = build.plan_steps(config, len(manifest), 1)
    accelerator = SimpleNamespace(
        device=torch.device(device), mixed_precision="no", process_index=0, num_processes=1
    )
    place, _ = loaders.place_loaders(config, accelerator)
    return [
        loaders.make_train_loader(config, manifest, schedule, accelerator, place),
        loaders.make_eval_loader(config, manifest, schedule.micro_batch_size, accelerator, place),
    ]


@pytest.mark.parametrize(("text", "expected"), [("0", 0.0), ("0.3", 0.3), ("1", 1.0), ("null", None)])
def test_the_load_of_the_jpeg_engine_reaches_both_decoders(manifest, decoders, text, expected):
    for loader in make_loaders(manifest, "cuda:0", ("data.hw_decoder_load", text)):
        loader._build(lambda: [])
    assert [options["device"] for options in decoders] == ["mixed", "mixed"]
    assert [options.get("hw_decoder_load") for options in decoders] == [expected, expected]


@pytest.mark.parametrize(("device", "decode"), [("cuda:0", "cpu"), ("cpu", "auto")])
def test_a_decoder_on_the_cpu_gets_no_load(manifest, decoders, device, decode):
    for loader in make_loaders(manifest, device, ("data.hw_decoder_load", "0.3"), ("data.decode", decode)):
        loader._build(lambda: [])
    assert [options["device"] for options in decoders] == ["cpu", "cpu"]
    assert not any("hw_decoder_load" in options for options in decoders)


@pytest.mark.parametrize("decode", ["mixed", "mixed_whole"])
def test_mixed_without_a_gpu_is_refused(manifest, decode):
    with pytest.raises(DataError, match=rf"data\.decode: {decode} decodes on a GPU"):
        make_loaders(manifest, "cpu", ("data.decode", decode))


@pytest.mark.parametrize("asked", ["mixed_whole", "auto"])
def test_mixed_whole_decodes_no_windows(manifest, decoders, monkeypatch, asked):
    """Neither where the user asks for it nor where the GPU's decoder fails with windows."""
    monkeypatch.setattr("pipelines.decoder_probe.fault_of", lambda _, way: "fails" * (way == "mixed"))
    for loader in make_loaders(manifest, "cuda:0", ("data.decode", asked)):
        loader._build(lambda: [])
    assert [options["device"] for options in decoders] == ["mixed", "mixed"]
    assert not any("start" in options for options in decoders)


def test_all_ranks_decode_in_the_way_that_works_on_every_host(monkeypatch):
    """The first process of each host tries; the slowest way found is everyone's."""
    config = load_config("configs/demo.yaml", [("train.global_batch_size", "12")]).config
    found = {"gpu1": ("mixed", []), "gpu2": ("mixed_whole", ["a line"]), "gpu3": ("mixed_whole", ["a line"])}
    monkeypatch.setattr(collectives, "gather", lambda mine, _: [*found.values(), mine, None])
    monkeypatch.setattr(loaders, "choose_decode", lambda place: pytest.fail("was tried"))
    accelerator = SimpleNamespace(
        device=torch.device("cuda:1"), process_index=3, num_processes=5, is_local_main_process=False
    )
    place, lines = loaders.place_loaders(config, accelerator, control="a group")
    assert (place.decode, lines) == ("mixed_whole", ["a line"])


def test_decoding_threads_for_a_gpu_are_capped(monkeypatch):
    """DALI keeps GPU memory for each of them."""
    config = load_config("configs/demo.yaml").config
    without = config.model_copy(update={"data": config.data.model_copy(update={"threads": None})})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(128))
    assert loaders.split_threads(without, torch.device("cuda:0")) == 24
    many = without.data.model_copy(update={"threads": 96})
    assert loaders.split_threads(without.model_copy(update={"data": many}), torch.device("cuda:0")) == 96


def test_decoding_alone_gives_whole_images(manifest):
    run = graphs.execution(Placement(), 12, reads_files=True)
    read = file_reader(manifest, 1)
    (output,) = graphs.decode_graph(lambda: [read(torch.arange(12).numpy())], run, windows=False).run()
    sizes = [np.asarray(output[i]).shape for i in range(12)]
    assert sizes == [
        (height, width, 3) for height, width in zip(manifest.heights, manifest.widths, strict=True)
    ]


def test_unused_memory_can_be_released_without_a_gpu():
    graphs.release_memory()


def _build(folder: str) -> None:
    tempfile.tempdir = folder  # DALI writes there what it has rewritten
    spec = AugmentSpec(32, color_jitter=0.4, rand_augment="3a")
    run = graphs.execution(Placement(), 2, reads_files=False)
    graphs.finish_graph(lambda: (), lambda: (), spec, run)
    graphs.file_graph(lambda: (), spec, run)
    written = "".join(path.read_text() for path in Path(folder).glob("*.py"))
    (Path(folder) / "names.json").write_text(json.dumps(re.findall(r"def autograph__(\w+)\(", written)))


@pytest.mark.slow
@pytest.mark.skipif(not graphs.READS_FILES, reason="DALI 1.34 rewrites all")
def test_only_functions_with_a_branch_are_rewritten(tmp_path):
    """In a new process: DALI rewrites a function once, and a forked one may have it already."""
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(str(tmp_path),))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == 0
    names = json.loads((tmp_path / "names.json").read_text())
    assert set(names) == {"graph", "_finished", "rand_augment_layer", "color_jitter"}
