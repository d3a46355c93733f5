"""Write files that look like images: odd ones that can be used, and broken ones of every kind."""

from __future__ import annotations

import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)).resize((500, 375))


def encoded(image: Image.Image = PHOTO, fmt: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def claiming(height: int, width: int) -> bytes:
    """Return a small JPEG whose header promises height x width pixels."""
    data = bytearray(encoded())
    struct.pack_into(">HH", data, data.find(b"\xff\xc0") + 5, height, width)
    return bytes(data)


@cache
def png_bomb(height: int, width: int) -> bytes:
    """Return a whole PNG of black pixels: small as a file, height * width * 3 bytes when decoded."""
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(width * 3 + 1)) for _ in range(height)) + rows.flush()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def garbled() -> bytes:
    """Return a JPEG with wrong bytes in its pixels: it decodes, to noise, and no decoder can notice."""
    data = bytearray(encoded())
    for place in range(data.find(b"\xff\xda") + 200, len(data) - 2, 371):
        if 0xFF not in data[place - 1 : place + 2]:
            data[place] ^= 0x05
    return bytes(data)


def write_good(folder: Path) -> set[str]:
    """Write odd files that can be used; return their names."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "good.jpg": encoded(),
        "garbled.jpg": garbled(),
        "cmyk.jpg": encoded(PHOTO.convert("CMYK")),
        "grey.jpg": encoded(PHOTO.convert("L")),
        "one_pixel.jpg": encoded(PHOTO.resize((1, 1))),
        "png_named.JPEG": encoded(fmt="PNG"),
        "progressive.jpg": encoded(progressive=True),
        "rotated.jpg": encoded(exif=exif),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return set(files)


def write_bad(folder: Path) -> dict[str, str]:
    """Write files that cannot be used; return the kind of each name."""
    whole = encoded()
    files = {
        "empty.jpg": (b"", "truncated"),
        "cut_half.jpg": (whole[: len(whole) // 2], "truncated"),
        "cut_at_the_end.jpg": (whole[:-20], "truncated"),
        "cut_in_the_header.jpg": (whole[:150], "truncated"),
        "text.jpg": (b"<html>not found</html>\n" * 20, "not_an_image"),
        "no_rows.jpg": (claiming(0, 500), "not_an_image"),
        "claims_20000.jpg": (claiming(20000, 20000), "too_large"),
        "claims_65500.jpg": (claiming(65500, 65500), "too_large"),
        "png_bomb.jpg": (png_bomb(16000, 16000), "too_large"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    kinds = {name: kind for name, (_, kind) in files.items()}
    kinds |= {"folder.jpg": "not_an_image", "loop.jpg": "missing", "pipe.jpg": "not_an_image"}
    if os.geteuid():  # nothing is unreadable for root
        (folder / "unreadable.jpg").write_bytes(whole)
        (folder / "unreadable.jpg").chmod(0)
        kinds["unreadable.jpg"] = "missing"
    return kinds
