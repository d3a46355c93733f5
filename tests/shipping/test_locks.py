"""The lock files pair DALI with a decoder that is known to decode regions of JPEGs on a GPU."""

import re

import pytest
from helpers.runs import ROOT
from packaging.version import Version

LOCKS = sorted(ROOT.glob("requirements*.lock"))
CRASH = (
    "nvImageCodec is not 0.8: 0.9 is reported to end the process on an H100, and to fail on an A100, where "
    "it decodes regions (NVIDIA/nvImageCodec issue 55); until a GPU shows otherwise lock 0.8, with DALI 2.2"
)
ON_CPU = (
    "nvImageCodec 0.9 leaves regions of subsampled JPEGs to the CPU where fancy upsampling is on and nvJPEG "
    "is older than 13.2; lock 0.8, or a newer nvJPEG"
)


def locked(text):
    """Return {package: version} of a lock file, without the CUDA version at the end of a name."""
    pinned = re.findall(r"^([a-z0-9._-]+?)(?:-cu\d+|-cuda\d+)?==([^\s;]+)", text, re.MULTILINE)
    return {name: Version(version) for name, version in pinned}


def complaints(packages):
    """Return why a GPU would not decode regions with these packages. DALI 1 brings a decoder of its own."""
    codec = packages.get("nvidia-nvimgcodec")
    if packages["nvidia-dali"].major < 2:
        return []
    if codec is None:
        return ["DALI 2 needs nvImageCodec, which is not in the lock"]
    found = [] if codec.release[:2] == (0, 8) else [CRASH]
    if codec >= Version("0.9") and packages["nvidia-nvjpeg"] < Version("13.2"):
        found.append(ON_CPU)
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_gpu_decodes_regions_with_the_locked_packages(lock):
    found = complaints(locked(lock.read_text()))
    assert not found, "; ".join(found)


def test_the_locks_are_those_of_the_three_flavours():
    versions = {path.name: locked(path.read_text()) for path in LOCKS}
    assert {name: packages["nvidia-dali"].major for name, packages in versions.items()} == {
        "requirements.lock": 2,
        "requirements-cuda120.lock": 2,
        "requirements-cuda110.lock": 1,
    }
    nvjpeg = {
        name: packages["nvidia-nvjpeg"] for name, packages in versions.items() if "cuda110" not in name
    }
    # CUDA 12 has no nvJPEG of 13.2 or newer: a newer nvImageCodec there takes more than an upgrade.
    assert nvjpeg["requirements-cuda120.lock"] < Version("13.2") <= nvjpeg["requirements.lock"]


@pytest.mark.parametrize(
    ("pins", "expected"),
    [
        ("nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20 nvidia-nvjpeg==13.3.2.43", [CRASH]),
        (
            "nvidia-dali-cuda120==2.4.0 nvidia-nvimgcodec-cu12==0.9.0.20 nvidia-nvjpeg-cu12==12.4.0.76",
            [CRASH, ON_CPU],
        ),
        ("nvidia-dali-cuda130==2.2.0 nvidia-nvimgcodec-cu13==0.8.0.22 nvidia-nvjpeg==13.3.2.43", []),
        ("nvidia-dali-cuda130==2.0.0 nvidia-nvimgcodec-cu13==0.7.0.11 nvidia-nvjpeg==13.3.2.43", [CRASH]),
        (
            "nvidia-dali-cuda130==2.2.0 nvidia-nvjpeg==13.3.2.43",
            ["DALI 2 needs nvImageCodec, which is not in the lock"],
        ),
        ("nvidia-dali-cuda110==1.34.0", []),
    ],
)
def test_other_pairs_are_refused(pins, expected):
    text = "".join(f"{pin} \\\n    --hash=sha256:0\n" for pin in pins.split())
    assert complaints(locked(text)) == expected
