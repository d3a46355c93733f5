"""A bucket on loopback: the two requests of S3 that a reader sends, over a folder, with faults on demand."""

import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SECRET, KEY = "sEcReT0123456789", "AKIAVERYSECRETKEY"


@dataclass
class Bucket:
    """`fault`: from path and number of a request to what goes wrong with it, or None."""

    folder: Path
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)  # path, range
    fault: Callable[[str, int], str | None] = lambda path, number: None
    latency: float = 0.0

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
        }

    def of_images(self) -> list[tuple[str, str]]:
        return [(path, of) for path, of in self.requests if path.endswith(".tar")]


@contextmanager
def bucket(folder: Path) -> Iterator[Bucket]:
    """Serve `folder` as s3://images; its name, images, is the first part of each path."""
    served = Bucket(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 20  # head and body in one packet

        def do_GET(self) -> None:
            number = len(served.requests)
            served.requests.append((self.path, self.headers.get("Range", "")))
            time.sleep(served.latency)
            fault = served.fault(self.path, number) or ""
            path = served.folder / self.path.removeprefix("/images/")
            if fault.startswith("stall "):
                time.sleep(float(fault.split()[1]))
            if fault.isdigit():  # real stores repeat the key in their answers
                self.answer(int(fault), f"<AWSAccessKeyId>{KEY}</AWSAccessKeyId>".encode())
            elif not path.is_file():
                self.answer(404, b"<Code>NoSuchKey</Code>")
            else:
                self.give(path, fault)

        def give(self, path: Path, fault: str) -> None:
            state = path.stat()
            tag, size = f'"{state.st_mtime_ns}-{state.st_size}"', state.st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            begin, end = (int(found[1]), int(found[2]) + 1) if found else (0, size)
            with path.open("rb") as file:
                file.seek(begin)
                part = file.read(end - begin)
            if fault == "corrupt":
                middle = len(part) // 2
                part = part[:middle] + bytes(600) + part[middle + 600 :]
            if self.headers.get("If-None-Match") == tag:
                self.answer(304, b"", tag)
            elif found:
                self.answer(206, part, tag, f"bytes {begin}-{end - 1}/{size}", fault == "cut")
            else:
                self.answer(200, part, tag, is_cut=fault == "cut")

        def answer(
            self, status: int, body: bytes, tag: str = "", part: str = "", is_cut: bool = False
        ) -> None:
            self.send_response(status)
            if tag:
                self.send_header("ETag", tag)
                self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            if status == 206:
                self.send_header("Content-Range", part)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if is_cut:
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
