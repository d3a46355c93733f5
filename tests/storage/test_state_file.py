"""A forged checkpoint runs no code, takes no memory, leads nowhere else, and is refused in one line."""

import hashlib
import io
import json
import math
import os
import pickle
import resource
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from cmtrain.storage.checkpoint import load_checkpoint, load_newest, save_checkpoint
from cmtrain.storage.state_file import MAX_DEPTH, CheckpointError, Digest, read_state, write_state

GOOD = {"model": {"weight": torch.arange(6.0)}, "progress": {"step": 1}}
DEEP = MAX_DEPTH + 2
BIG = 40000  # a square of it in fp32 is 6.4 GB
MAX_GROWTH_KB = 300_000  # of this process, by one refusal
STATE = "state.safetensors"


def publish(root, data, more=(), **manifest):
    """A checkpoint folder whose state file holds `data`, with a manifest that vouches for it."""
    path = root / "step-000000001"
    path.mkdir(parents=True, exist_ok=True)
    (path / STATE).write_bytes(data)
    files = {STATE: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}} | dict(more)
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": files, "meta": {}} | manifest))
    return path


def archive(pickled):
    """A file as torch.save writes it, of any pickle and one storage."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "data/0": b"\0" * 16}.items():
            file.writestr(f"archive/{name}", content)
    return data.getvalue()


def calling(name, arguments, opcode="GLOBAL"):
    """A pickle of {"model": name(*arguments)}, its name looked up by `opcode`."""
    module, function = name
    lookup = f"c{module}\n{function}\n".encode()
    if opcode == "STACK_GLOBAL":
        lookup = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in name) + b"\x93"
    return b"\x80\x04}X\x05\0\0\0model" + lookup + pickle.dumps(arguments, 2)[2:-1] + b"Rs."


def forged(text, data=b"\0" * 16):
    """A safetensors file with the header `text` and the tensors `data`."""
    return len(text).to_bytes(8, "little") + text + data


def holding(tensors, state=("dict", ["model", ("tensor", "w", 1)])):
    """A safetensors file of 16 bytes of data, whose header has `tensors` (name: dtype, shape, offsets)."""
    header = {"__metadata__": {"state": state if isinstance(state, str) else json.dumps(state)}}
    header |= {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in tensors.items()
    }
    return forged(json.dumps(header).encode())


def describing(*state, text=None):
    """A safetensors file with the tensor `w` of 4 numbers, and a state that is the JSON `state` or
    `text`."""
    return holding({"w": ("F32", [4], [0, 16])}, text or state)


def model(*value):
    """A state whose model is the JSON `value`."""
    return describing("dict", ["model", value])


def saved(state=GOOD):
    data = io.BytesIO()
    torch.save(state, data)
    return data.getvalue()


SYSTEM = ("os", "system")
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
W = ("tensor", "w", 1)
# Files that would run code or take memory if they were unpickled.
PICKLES = {
    "code": lambda canary: archive(calling(SYSTEM, (f"touch {canary}",))),
    "code by STACK_GLOBAL": lambda canary: archive(calling(SYSTEM, (f"touch {canary}",), "STACK_GLOBAL")),
    "eval": lambda canary: archive(calling(("builtins", "eval"), (f"open({str(canary)!r}, 'w')",))),
    "code in a plain pickle": lambda canary: calling(SYSTEM, (f"touch {canary}",)),
    "code as torch wrote it before zip": lambda canary: pickle.dumps(TORCH_MAGIC) + calling(SYSTEM, "x"),
    "6.4 GB tensor in 1 kB": lambda canary: archive(calling(("torch", "Tensor"), (BIG, BIG))),
    "6 GB bytearray in 1 kB": lambda canary: archive(calling(("builtins", "bytearray"), (6 * 10**9,))),
    "a good file of torch.save": lambda canary: saved(),
    "code behind a header": lambda canary: forged(b"{}", calling(SYSTEM, (f"touch {canary}",))),
}  # fmt: skip
HEADERS = {
    "empty": lambda: b"",
    "zeros": lambda: bytes(1000),
    "cut in the length": lambda: b"\x08\0\0",
    "cut in the header": lambda: describing("dict")[:40],
    "cut in the tensors": lambda: describing("dict")[:-4],
    "more bytes than tensors": lambda: describing("dict") + b"\0",
    "header of 40 MB": lambda: forged(b"{}" + b" " * (40 * 2**20)),
    "header said to have 2**62 bytes": lambda: (2**62).to_bytes(8, "little") + b"{}",
    "header of nonsense": lambda: forged(b"\xff\xfe\xfd"),
    "header nested 100,000 deep": lambda: forged(b'{"a":' * 100_000),
    "no metadata": lambda: forged(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "metadata without a state": lambda: forged(b'{"__metadata__":{"format":"pt"}}', b""),
    "tensor of 6.4 GB": lambda: holding({"w": ("F32", [BIG, BIG], [0, 4 * BIG * BIG])}),
    "shape of 6.4 GB over 16 bytes": lambda: holding({"w": ("F32", [BIG, BIG], [0, 16])}),
    "shape that overflows": lambda: holding({"w": ("F32", [2**40, 2**40], [0, 16])}),
    "negative shape": lambda: holding({"w": ("F32", [-4], [0, 16])}),
    "unknown dtype": lambda: holding({"w": ("PICKLE", [4], [0, 16])}),
    "tensors with a hole": lambda: holding({"w": ("F32", [1], [0, 4]), "v": ("F32", [2], [8, 16])}),
    "tensors that overlap": lambda: holding({"w": ("F32", [4], [0, 16]), "v": ("F32", [4], [0, 16])}),
    "offsets backwards": lambda: holding({"w": ("F32", [4], [16, 0])}),
}  # fmt: skip
STATES = {
    "nonsense": lambda: describing(text="{"),
    "a list": lambda: describing("list", 1),
    "a number": lambda: describing(text="7"),
    "an object": lambda: describing(text='{"model": 1}'),
    "no kind": lambda: describing(text="[]"),
    "unknown kind": lambda: model("set", 1),
    "a call": lambda: model("os.system", "true"),
    "tensor that is not there": lambda: model("tensor", "x", 1),
    "tensor without a name": lambda: model("tensor"),
    "tensor named twice": lambda: model("list", W, W),
    "tensor with a stride too many": lambda: model("tensor", "w", 1, 1),
    "stride of 0": lambda: model("tensor", "w", 0),
    "stride of 2": lambda: model("tensor", "w", 2),
    "negative stride": lambda: model("tensor", "w", -1),
    "stride of 2**70": lambda: model("tensor", "w", 2**70),
    "stride in words": lambda: model("tensor", "w", "one"),
    "entry without a value": lambda: model("dict", ["a"]),
    "entry that is a number": lambda: model("dict", 1),
    "list as a key": lambda: model("dict", [["a"], 1]),
    "nested too deeply": lambda: describing(text='["list", ' * DEEP + "1" + "]" * DEEP),
    "nested 100,000 deep": lambda: describing(text="[" * 100_000),
    "number of 100,000 digits": lambda: describing(text='["dict", ["a", ' + "1" * 100_000 + "]]"),
}  # fmt: skip
OUTSIDE = {"bytes": 1, "sha256": "0" * 64}
MANIFESTS = {
    "path out": {"files": {f"../../{STATE}": OUTSIDE}},
    "absolute path": {"files": {"/etc/passwd": OUTSIDE}},
    "one more file": {"more": {"../../x": OUTSIDE}},
    "no files": {"files": []},
    "no digest": {"files": {STATE: None}},
    "negative size": {"files": {STATE: {"bytes": -1, "sha256": ""}}},
    "no meta": {"meta": None},
}


TRIED = []


def refusal(path):
    TRIED.append(False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KB
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < len(str(path)) + 300
    assert str(path) in line
    TRIED[-1] = True
    return line


@pytest.mark.parametrize("what", PICKLES)
def test_nothing_is_unpickled(tmp_path, what, monkeypatch):
    canary = tmp_path / "canary"
    path = publish(tmp_path, PICKLES[what](canary))
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("unpickled"))
    refusal(path)
    assert not canary.exists()


@pytest.mark.parametrize("what", HEADERS)
def test_a_forged_header_is_refused(tmp_path, what):
    refusal(publish(tmp_path, HEADERS[what]()))


@pytest.mark.parametrize("what", STATES)
def test_a_forged_state_is_refused(tmp_path, what):
    refusal(publish(tmp_path, STATES[what]()))


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_leads_nowhere_else(tmp_path, what):
    refusal(publish(tmp_path, describing("dict"), **MANIFESTS[what]))


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', "[" * 100_000, "{}" + " " * 2**20, "\udcff"])
def test_a_manifest_of_nonsense(tmp_path, text):
    path = publish(tmp_path, describing("dict"))
    (path / "manifest.json").write_text(text, errors="surrogateescape")
    assert "manifest" in refusal(path)


@pytest.mark.parametrize("name", [STATE, "manifest.json"])
def test_links_and_pipes_are_not_opened(tmp_path, name):
    path = publish(tmp_path / "run", describing("dict"))
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    assert f"{name}: is a symbolic link" in refusal(path)
    (path / name).unlink()
    os.mkfifo(path / name)  # opening one for reading waits for a writer, for ever
    assert f"{name}: not a regular file" in refusal(path)
    (path / name).unlink()
    (path / name).mkdir()
    refusal(path)


def test_a_checkpoint_folder_is_not_a_link(tmp_path):
    elsewhere = publish(tmp_path / "elsewhere", describing("dict"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / elsewhere.name).symlink_to(elsewhere)
    assert "is a symbolic link" in refusal(tmp_path / "run" / elsewhere.name)
    with pytest.raises(CheckpointError, match=f"no usable checkpoint in .*run, but {elsewhere.name}"):
        load_newest(tmp_path / "run")


def tensors():
    """Tensors of every dtype, shape and layout that a state may hold."""
    dtypes = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    ]  # fmt: skip
    images = torch.randn(2, 3, 4, 4)
    found = {str(dtype): (10 * torch.randn(2, 3)).to(dtype) for dtype in dtypes}
    return found | {
        "channels last": images.to(memory_format=torch.channels_last),
        "1x1 channels last": torch.randn(8, 3, 1, 1).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "permuted": images.permute(3, 1, 0, 2),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "empty of 3 dimensions": torch.zeros(2, 0, 3),
        "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
        "random state": torch.get_rng_state(),
    }


def test_tensors_keep_bits_dtype_shape_and_strides(tmp_path):
    state = tensors()
    loaded = read_state(tmp_path / "x", write_state(tmp_path / "x", state))
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        mine = loaded[name]
        assert (mine.dtype, mine.shape, mine.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (mine, tensor)]
        assert torch.equal(*bits), name


def test_views_and_shared_tensors_keep_their_values(tmp_path):
    """Slices and expanded tensors become dense ones; tied weights become two tensors."""
    tied = torch.randn(3)
    state = {
        "every second": torch.arange(12.0)[::2],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "a": tied,
        "b": tied,
    }
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 2))
    loaded = read_state(tmp_path / "x", write_state(tmp_path / "x", state))
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].is_contiguous() for name in state)
    assert loaded["a"].data_ptr() != loaded["b"].data_ptr()
    assert type(loaded["parameter"]) is torch.Tensor


VALUES = [
    0, -1, 2**63, -(2**200), 0.1, 1e-320, -0.0, math.inf, -math.inf, True, False, None, "",
    "ä\n\0\udcff\U0001f600", [], (), {}, [[]], ((),), [1, (2, [3.0])], {"": 1}, {0: "a", "0": "b", -1: {}},
    ["list", 1], ("tensor", "w", 1), ["dict"],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_are_the_same(tmp_path, value):
    state = {"value": value, "beside": torch.ones(1)}
    loaded = read_state(tmp_path / "x", write_state(tmp_path / "x", state))["value"]
    assert repr(loaded) == repr(value)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0
    assert type(loaded) is type(value)


def test_nan_stays_nan(tmp_path):
    loaded = read_state(tmp_path / "x", write_state(tmp_path / "x", {"loss": [math.nan]}))
    assert math.isnan(loaded["loss"][0])


def test_keys_that_look_alike_are_kept_apart(tmp_path):
    state = {
        1: torch.zeros(1),
        "1": torch.ones(1),
        "a": {"b": torch.full((1,), 2.0)},
        "a/b": torch.full((1,), 3.0),
    }
    state |= {"__metadata__": torch.full((1,), 4.0), "1'": torch.full((1,), 5.0)}
    loaded = read_state(tmp_path / "x", write_state(tmp_path / "x", state))
    assert [loaded[1], loaded["1"], loaded["a"]["b"], loaded["a/b"]] == [0, 1, 2, 3]
    assert [loaded["__metadata__"], loaded["1'"]] == [4, 5]


class Evil:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (Evil(), "model/x: cannot save a Evil"), ({1.5: 1}, "model/x: cannot save a dict"),
        (torch.zeros(2, dtype=torch.complex64), r"model/x: cannot save a torch\.complex64"),
        (b"bytes", "model/x: cannot save a bytes"), (torch.float32, "model/x: cannot save a dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_back_is_not_saved(tmp_path, value, line):
    with pytest.raises(CheckpointError, match=line):
        save_checkpoint(tmp_path, 1, {"model": {"x": value}}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_contains_itself_is_not_saved(tmp_path):
    endless = {"a": 1}
    endless["b"] = endless
    with pytest.raises(CheckpointError, match="nested more than"):
        write_state(tmp_path / "x", endless)


def test_other_tools_can_read_the_tensors(tmp_path):
    """It is a safetensors file: names are paths in the state, shapes are the tensors' own."""
    state = {"model": tensors(), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}
    write_state(tmp_path / STATE, state)
    loaded = load_file(tmp_path / STATE)
    assert len(loaded) == len(state["model"]) + 1
    assert torch.equal(loaded["model/channels last"], state["model"]["channels last"])
    assert loaded["optimizer/state/0/step"] == 3


def test_what_is_loaded_is_memory_of_its_own(tmp_path):
    """safetensors maps the file; a checkpoint that is deleted later must not stay on the disk."""
    state = read_state(tmp_path / STATE, write_state(tmp_path / STATE, GOOD))
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()
    state["model"]["weight"] += 1


def test_what_is_hashed_is_what_was_meant_to_be_written(tmp_path):
    digest = write_state(tmp_path / "x", GOOD)
    data = (tmp_path / "x").read_bytes()
    assert digest == Digest(len(data), hashlib.sha256(data).hexdigest())
    assert torch.equal(read_state(tmp_path / "x", digest)["model"]["weight"], GOOD["model"]["weight"])


def test_trouble_of_the_machine_is_not_the_checkpoints_fault(tmp_path, monkeypatch):
    """Too many open files: the newest checkpoint is neither set aside nor passed over."""
    save_checkpoint(tmp_path, 1, GOOD, {})

    def exhausted(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        load_newest(tmp_path)
    monkeypatch.undo()
    assert load_newest(tmp_path).rejected == ()


def test_not_one_of_those_above_was_executed(figure, tmp_path_factory):
    executed = len(list(tmp_path_factory.getbasetemp().rglob("canary")))
    figure(f"hostile checkpoints: {len(TRIED)} tried, {sum(TRIED)} refused in one line, {executed} executed")
    assert (executed, sum(TRIED)) == (0, len(TRIED))
