"""Run the commands of README.md, docs/tutorial.md and docs/data.md in order, as they are printed.

Each code block of these pages carries a mark, an HTML comment on the line above it:

    <!-- test -->                run with `bash -e` or Python; it must succeed
    <!-- test: exit code 3 -->   the same; it must end with that code
    <!-- file: mine.yaml -->     the block is the content of that file
    <!-- not run: why -->        left out; a test that is named in the reason must exist
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.photographs import write_folder
from helpers.runs import ROOT

PAGES = ("README.md", "docs/tutorial.md", "docs/data.md")
BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"test(?:: exit code (?P<code>\d+))?|file: (?P<file>[\w.]+)|not run: (?P<reason>.+)")
MAX_SECONDS = 600  # for one block, on a machine that is busy with other things


class Block(NamedTuple):
    place: str  # page and line
    mark: str
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page, but not the ones that show output."""
    text = (ROOT / page).read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(f"{page}:{line}", match[1] or "", match[2], match[3]))
    return [block for block in found if block.language != "text"]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_marked(page):
    text = (ROOT / page).read_text()
    for block in blocks(page):
        mark = MARK.fullmatch(block.mark)
        assert mark, f"{block.place}: no mark, or one that is not known: {block.mark!r}"
        assert block.language in ("bash", "python", "yaml"), block.place
        assert bool(mark["file"]) == (block.language == "yaml"), f"{block.place}: yaml blocks are files"
        for named in re.findall(r"tests/[\w/.]+", mark["reason"] or ""):
            assert (ROOT / named).exists(), f"{block.place}: {named} does not exist"
    assert not re.search(r"^    \S", BLOCK.sub("", text), re.MULTILINE), (
        "a block that is not fenced has no mark"
    )


def checkout(folder: Path) -> Path:
    """Fill `folder` with what the pages start from: a checkout that is set up, and photographs.

    `make setup` finds its work done. The photographs are few, which keeps the runs short.
    """
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git", "runs", "photos"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / ".venv" / ".installed").touch()
    photos = folder / "photos"
    for split, count in (("train", 44), ("val", 12)):
        write_folder(photos / split, count, num_classes=2)
        for old, new in (("c0", "cat"), ("c1", "old dog")):
            (photos / split / old).rename(photos / split / new)
    for split in ("train", "val"):
        for number, path in enumerate(sorted((photos / split / "cat").iterdir()), start=1):
            path.rename(path.with_name(f"IMG {number:03d}.jpg"))
    (photos / "train" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    (photos / "train" / "cat" / "IMG 900.HEIC").write_bytes(b"another kind of file")
    shutil.copytree(photos / "train", folder / "pictures")
    shutil.copy(photos / "val" / "cat" / "IMG 001.jpg", folder / "new.jpg")
    return folder


def run(block: Block, folder: Path) -> None:
    """Run a block or write it as the file that it is. Fails with the block and all of its output."""
    mark = MARK.fullmatch(block.mark)
    if mark["reason"]:
        return
    if mark["file"]:
        (folder / mark["file"]).write_text(block.code)
        return
    command = ["bash", "-e", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, block.code], cwd=folder, env=environment, text=True, timeout=MAX_SECONDS,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == int(mark["code"] or 0), (
        f"{block.place}: exit code {done.returncode}\n{block.code}\n{done.stdout}"
    )


@pytest.mark.slow
@pytest.mark.timeout(3 * MAX_SECONDS)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_page_run(page, tmp_path):
    folder = checkout(tmp_path)
    for block in blocks(page):
        run(block, folder)
