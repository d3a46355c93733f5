"""A decoder that crashes, hangs or gives other pixels costs one line, and the next way to decode is used."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.decoder_probes import program

from pipelines import decoder_probe
from pipelines.dali import graphs
from pipelines.decoder_probe import choose_decode, decoded, fault_of
from pipelines.spec import Placement

GPU = Placement(device="cuda:0", threads=2)
INSTEAD = "decoding whole images on the GPU and cutting them there instead"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("crash", "crashes (SIGSEGV)"),
        ("hang", "hangs (no answer in 1.5 s)"),
        ("error", "fails (exit code 1: INTERNAL_ERROR (8))"),
    ],
)
def test_a_faulty_decoder_falls_back_to_the_next_with_one_line(monkeypatch, fault, text):
    def probe(place, decode):
        if decode == "mixed_whole":
            return ""
        return fault_of(place, decode, max_seconds=1.5 if fault == "hang" else 60)

    monkeypatch.setattr(decoder_probe, "_COMMAND", program(fault))
    monkeypatch.setattr(decoder_probe, "fault_of", probe)
    assert choose_decode(GPU) == ("mixed_whole", [f"data.decode: mixed {text}; {INSTEAD}"])


def test_where_both_ways_fail_the_cpu_decodes(monkeypatch):
    monkeypatch.setattr(decoder_probe, "_COMMAND", program("crash"))
    decode, lines = choose_decode(GPU)
    assert decode == "cpu"
    assert lines[1] == "data.decode: mixed_whole crashes (SIGSEGV); decoding on the CPU instead"
    assert len(lines) == 2


def test_a_sound_decoder_is_used_without_a_word(monkeypatch):
    monkeypatch.setattr(decoder_probe, "fault_of", lambda *_: "")
    assert choose_decode(GPU) == ("mixed", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_no_other_process_can_use_is_no_fault_of_the_decoder():
    """The child fails to reach any GPU before it decodes."""
    decode, (line,) = choose_decode(GPU)
    assert decode == "mixed"
    assert line.startswith("data.decode: mixed is untried, because another process cannot use cuda:0: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("asked", "tried"), [("auto", ["mixed", "mixed_whole"]), ("mixed", ["mixed", "mixed_whole"]),
                         ("mixed_whole", ["mixed_whole"]), ("cpu", [])],
)  # fmt: skip
def test_what_the_user_asks_for_is_tried_first(monkeypatch, asked, tried):
    seen = []
    monkeypatch.setattr(decoder_probe, "fault_of", lambda place, way: seen.append(way) or "fails")
    decode, _ = choose_decode(replace(GPU, decode=asked))
    assert (decode, seen) == ("cpu", tried)


def test_nothing_is_tried_without_a_gpu(monkeypatch):
    monkeypatch.setattr(decoder_probe, "fault_of", lambda *_: pytest.fail("was tried"))
    assert choose_decode(Placement()) == ("cpu", [])


def test_the_probe_runs_from_any_folder(tmp_path, monkeypatch):
    """It decodes on the device that it is given; here that is the CPU, and it agrees with itself."""
    monkeypatch.chdir(tmp_path)
    assert fault_of(Placement(device="cpu"), "cpu") == ""
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def batches() -> dict[bool, list[np.ndarray]]:
    return {windows: decoded(Placement(threads=2), windows) for windows in (True, False)}


@pytest.mark.parametrize("in_windows", [True, False])
@pytest.mark.parametrize(
    ("hurt", "text"),
    [
        (lambda image: np.roll(image, 1, axis=1), "other pixels than the CPU in 1 of 32 images (by up to "),
        (lambda image: image[..., ::-1], "other pixels than the CPU in 1 of 32 images (by up to "),
        (lambda image: image // 255, "other pixels than the CPU in 1 of 32 images (by up to "),
        (lambda image: image[1:], "images of other sizes than the CPU"),
        (lambda image: image // 2 * 2, ""),  # half a level: another decoder's rounding
    ],
    ids=["one pixel off", "channels swapped", "black", "size", "rounding"],
)
def test_pixels_and_sizes_are_compared(monkeypatch, batches, hurt, text, in_windows):
    """One of 32 images is wrong, in crop windows or in whole images."""

    def decoded_wrongly(place, windows):
        images = list(batches[windows])
        if place.device == "cpu:0" and windows == in_windows:
            images[7] = hurt(images[7])
        return images

    monkeypatch.setattr(decoder_probe, "decoded", decoded_wrongly)
    fault = decoder_probe._compare("mixed", "cpu:0", None, 2)
    assert fault.startswith(f"gives {text}") if text else fault == ""


def test_the_batch_has_windows_of_every_image(batches):
    assert all(window.size < whole.size for window, whole in zip(*batches.values(), strict=True))
    assert len({window.shape for window in batches[True]}) == 32


def test_whole_images_that_are_cut_have_the_pixels_of_windows(monkeypatch, batches):
    """The graph of mixed_whole on the CPU's decoder: it cuts windows that the other graph decodes alone."""
    original, ways = graphs._decode, []

    def decode_whole(run, files, windows=None):
        ways.append(windows is not None)
        return original(replace(run, decode="mixed_whole"), files, windows)

    monkeypatch.setattr(graphs, "_decode", decode_whole)
    whole = decoded(Placement(threads=2), True)
    assert ways == [True]
    assert all(np.array_equal(a, b) for a, b in zip(whole, batches[True], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("load", [None, 0.0, 1.0])
@pytest.mark.parametrize("decode", ["mixed", "mixed_whole"])
def test_this_gpus_decoder(decode, load):
    assert fault_of(replace(GPU, hw_decoder_load=load), decode) == ""
