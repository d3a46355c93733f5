"""A checkpoint from anyone: it runs no code, takes no memory, leads nowhere else, and is refused in one line."""

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from cmtrain.storage.checkpoint import load_checkpoint, load_newest, save_checkpoint
from cmtrain.storage.state_file import CheckpointError, Digest, read_state, write_state

GOOD = {"model": {"weight": torch.arange(6.0)}, "progress": {"step": 1}}
BIG = 40000  # a square of it in fp32 is 6.4 GB


def publish(root, data, more=(), **manifest):
    """A checkpoint folder whose state.pt holds `data`, with a manifest that vouches for it."""
    path = root / "step-000000001"
    path.mkdir(parents=True, exist_ok=True)
    (path / "state.pt").write_bytes(data)
    files = {"state.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}} | dict(more)
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": files, "meta": {}} | manifest))
    return path


def archive(pickled, records=(b"\0" * 16,), compress=zipfile.ZIP_STORED, **changes):
    """A file as torch.save writes it, of any pickle and any storages."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compress) as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            file.writestr(f"archive/{name}", content)
        for key, record in enumerate(records):
            file.writestr(f"archive/data/{key}", record)
    return data.getvalue()


def calling(name, arguments, opcode="GLOBAL"):
    """A pickle of {"model": name(*arguments)}, its name looked up by `opcode`."""
    module, function = name
    lookup = f"c{module}\n{function}\n".encode()
    if opcode == "STACK_GLOBAL":
        lookup = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in name) + b"\x93"
    return b"\x80\x04}X\x05\0\0\0model" + lookup + pickle.dumps(arguments, 2)[2:-1] + b"Rs."


def tensor(numel, shape, stride):
    """A pickle of {"model": a tensor of that shape over storage 0, which is said to have `numel` elements}."""

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    data = io.BytesIO()
    Pickler(data, 2).dump({"model": Rebuilt()})
    return data.getvalue()


def saved():
    data = io.BytesIO()
    torch.save(GOOD, data)
    return data.getvalue()


def lying_directory():
    """The zip directory says of a record that it has 4 GB."""
    data = bytearray(archive(tensor(4, (4,), (1,))))
    place = data.rindex(b"archive/data/0") - 46 + 24
    data[place : place + 4] = (2**32 - 2).to_bytes(4, "little")
    return bytes(data)


SYSTEM = ("os", "system")
# What torch.load must never get to see, because it would run it or pay for it.
REFUSED_UNREAD = {
    "code": lambda canary: archive(calling(SYSTEM, (f"touch {canary}",))),
    "code by STACK_GLOBAL": lambda canary: archive(calling(SYSTEM, (f"touch {canary}",), "STACK_GLOBAL")),
    "eval": lambda canary: archive(calling(("builtins", "eval"), (f"open({str(canary)!r}, 'w')",))),
    "code in a plain pickle": lambda canary: calling(SYSTEM, (f"touch {canary}",)),
    "code as torch wrote before zip": lambda canary: pickle.dumps(0x1950A86A20F9469CFC6C) + calling(SYSTEM, ("x",)),
    "6.4 GB tensor in 1 kB": lambda canary: archive(calling(("torch", "Tensor"), (BIG, BIG))),
    "6 GB bytearray in 1 kB": lambda canary: archive(calling(("builtins", "bytearray"), (6 * 10**9,))),
    "meta tensor": lambda canary: archive(
        calling(("torch._utils", "_rebuild_meta_tensor_no_storage"), (torch.float32, (BIG, BIG), (BIG, 1), False))
    ),
    "compressed 64 MB": lambda canary: archive(tensor(2**24, (2**24,), (1,)), [bytes(2**26)], zipfile.ZIP_DEFLATED),
    "record said to have 4 GB": lambda canary: lying_directory(),
    "no pickle": lambda canary: archive(b"").replace(b"data.pkl", b"data.xxx"),
    "pickle of 40 MB": lambda canary: archive(bytes(40 * 2**20)),
    "no archive": lambda canary: b"\0" * 1000,
    "empty": lambda canary: b"",
    "cut off": lambda canary: saved()[:-200],
}  # fmt: skip
# What torch refuses by itself, or returns without having paid for it.
REFUSED = {
    "storage of 4 GB in a record of 16 bytes": lambda: archive(tensor(2**30, (2**30,), (1,))),
    "shape beyond its storage": lambda: archive(tensor(4, (2**30,), (1,))),
    "10**12 elements by stride 0": lambda: archive(tensor(4, (10**6, 10**6), (0, 0))),
    "a list": lambda: archive(b"\x80\x02]."),
    "a recursive list": lambda: archive(b"\x80\x02]q\0h\0a."),
    "pickle that ends early": lambda: archive(b"\x80\x02}"),
    "pickle of nonsense": lambda: archive(b"\xff\xfe\xfd"),
}
OUTSIDE = {"bytes": 1, "sha256": "0" * 64}
MANIFESTS = {
    "path out": {"files": {"../../state.pt": OUTSIDE}},
    "absolute path": {"files": {"/etc/passwd": OUTSIDE}},
    "one more file": {"more": {"../../x": OUTSIDE}},
    "no files": {"files": []},
    "no digest": {"files": {"state.pt": None}},
    "negative size": {"files": {"state.pt": {"bytes": -1, "sha256": ""}}},
    "no meta": {"meta": None},
}


TRIED = []


def refusal(path):
    TRIED.append(False)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    TRIED[-1] = True
    return line


@pytest.mark.parametrize("what", REFUSED_UNREAD)
def test_refused_before_torch_sees_it(tmp_path, what, monkeypatch):
    canary = tmp_path / "canary"
    path = publish(tmp_path, REFUSED_UNREAD[what](canary))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    refusal(path)
    assert not canary.exists()


@pytest.mark.parametrize("what", REFUSED)
def test_refused_when_it_is_read(tmp_path, what):
    refusal(publish(tmp_path, REFUSED[what]()))


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_leads_nowhere_else(tmp_path, what):
    refusal(publish(tmp_path, saved(), **MANIFESTS[what]))


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', "[" * 100_000, "{}" + " " * 2**20, "\udcff"])
def test_a_manifest_of_nonsense(tmp_path, text):
    path = publish(tmp_path, saved())
    (path / "manifest.json").write_text(text, errors="surrogateescape")
    assert "manifest" in refusal(path)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_links_and_pipes_are_not_opened(tmp_path, name):
    path = publish(tmp_path / "run", saved())
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
    elsewhere = publish(tmp_path / "elsewhere", saved())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / elsewhere.name).symlink_to(elsewhere)
    assert "is a symbolic link" in refusal(tmp_path / "run" / elsewhere.name)
    with pytest.raises(CheckpointError, match=f"no usable checkpoint in .*run, but {elsewhere.name}"):
        load_newest(tmp_path / "run")


def test_a_good_one_of_every_kind_of_value_is_read(tmp_path):
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
    ]
    state = GOOD | {
        "kinds": [torch.ones(2, 2, dtype=dtype) for dtype in [*dtypes, torch.int8, torch.uint8, torch.bool]],
        "layout": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "values": {"none": None, 3: [1, 2.5, "x", (True, False)]},
        "empty": torch.zeros(0),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, state, {})).state
    assert all(torch.equal(mine, its) for mine, its in zip(state["kinds"], loaded["kinds"], strict=True))
    assert loaded["layout"].stride() == state["layout"].stride()
    assert loaded["values"] == state["values"]
    assert loaded["empty"].numel() == 0


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
