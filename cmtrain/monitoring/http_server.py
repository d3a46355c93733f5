"""Serve a few pages about a run over HTTP, so cheaply that no number of clients slows training down.

Every connection has a thread, and all of them together answer a limited number of requests per second:
whatever runs here takes the interpreter's lock from the training thread, which gives it up at every torch
call. Only the paths in `routes` are served. No path is ever looked up on a disk.
"""

import contextlib
import errno
import functools
import ipaddress
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

PORT_ATTEMPTS = 32
MAX_CONNECTIONS = 64
WATCHED_SECONDS = 5.0  # a page that somebody looks at was asked for this recently
LINGER_SECONDS = 2.2  # the live page asks again after 2

# A turn is one request, with its connection if that is new. A scraper needs one turn per scrape.
TURNS_PER_SECOND = 100
TURNS_AT_ONCE = 25

TEXT, JSON = "text/plain; charset=utf-8", "application/json"


class Page(NamedTuple):
    content_type: str
    body: bytes
    status: int = 200


Route = Callable[[], Page]  # makes a page, on a thread of the server


class Exporter(socketserver.ThreadingTCPServer):
    """Serves `routes` (pages by path) at `host` (a name, IPv4 or IPv6) from daemon threads until `close`.

    `port`: the first of PORT_ATTEMPTS to try. `allowed_hosts`: see is_own_host. Beyond MAX_CONNECTIONS
    (HTTP/1.1), a new one replaces the one that has been silent for longest: no client can keep a scraper
    out. Raises OSError: none of the ports is free, or `host` is no address of this machine.
    """

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 512

    def __init__(
        self, routes: Mapping[str, Route], host: str, port: int, allowed_hosts: Sequence[str] = ()
    ) -> None:
        self.routes, self.allowed_hosts = routes, frozenset(name.lower() for name in (host, *allowed_hosts))
        self.connections: dict[socket.socket, float] = {}  # when each one last began or asked for a page
        self.turns_taken_until = 0.0
        self.asked_at: dict[str, float] = {}  # path -> when the newest answered request for it came
        self.changed = threading.Condition()
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, (address, *_) = found[0]
        last = min(port + PORT_ATTEMPTS - 1, 65535)
        for candidate in range(port, last + 1):
            try:
                super().__init__((str(address), candidate), _Handler)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        else:
            raise OSError(f"metrics.port: {port}..{last} are all in use")
        self.host, self.port = host, int(self.server_address[1])
        self.thread = threading.Thread(target=self.serve_forever, args=[0.1], name="exporter", daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """`http://host:port`, without a slash at the end."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def linger(self, path: str) -> None:
        """Wait until a watched page is asked for once more: LINGER_SECONDS at most, or until Ctrl-C."""
        now = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt), self.changed:
            if now - self.asked_at.get(path, -math.inf) < WATCHED_SECONDS:
                self.changed.wait_for(lambda: self.asked_at[path] >= now, LINGER_SECONDS)

    def close(self) -> None:
        """Close all connections and end the thread that accepts them."""
        self.shutdown()
        self.thread.join()
        self.server_close()
        with self.changed:
            while self.connections:
                self._drop_longest_silent()

    def wait_for_turn(self) -> None:
        """Wait for the next free turn; requests get theirs in the order in which they ask."""
        with self.changed:
            now = time.monotonic()
            self.turns_taken_until = max(self.turns_taken_until, now) + 1 / TURNS_PER_SECOND
            seconds = self.turns_taken_until - now - TURNS_AT_ONCE / TURNS_PER_SECOND
        time.sleep(max(0.0, seconds))

    def _drop_longest_silent(self) -> None:
        connection = min(self.connections, key=self.connections.__getitem__)
        del self.connections[connection]
        with contextlib.suppress(OSError):  # its thread may have closed it
            connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        self.wait_for_turn()
        return super().get_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.changed:
            self.connections[request] = time.monotonic()
            if len(self.connections) > MAX_CONNECTIONS:
                self._drop_longest_silent()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.changed:
            self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write nothing about a client that has left: stderr belongs to the run."""


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection until the client leaves or is silent for `timeout` seconds."""

    protocol_version, default_request_version = "HTTP/1.1", "HTTP/1.0"
    server_version, sys_version = "cmtrain", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", TEXT
    timeout, disable_nagle_algorithm = 5.0, True
    server: Exporter

    def do_GET(self) -> None:
        begun, path = time.monotonic(), self.path.partition("?")[0]
        with self.server.changed:
            if self.connection in self.server.connections:
                self.server.connections[self.connection] = begun
        page = self._page(path)
        # A body follows the head, and nothing here reads it: the next request cannot be found.
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close" if has_body or self.close_connection else "keep-alive")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)
        with self.server.changed:
            self.server.asked_at |= dict.fromkeys({path} & self.server.routes.keys(), begun)
            self.server.changed.notify_all()
        if not self.close_connection:
            self.server.wait_for_turn()

    do_HEAD = do_GET  # noqa: N815

    def _page(self, path: str) -> Page:
        hosts = self.headers.get_all("Host", [])
        if not all(is_own_host(host, self.server.allowed_hosts) for host in hosts):
            text = '{"error": "Host is no name of this machine; see metrics.allowed_hosts"}\n'
            return Page(JSON, text.encode(), 403)
        if path not in self.server.routes:
            return Page(TEXT, b"404 no such page\n", 404)
        try:
            return self.server.routes[path]()
        except Exception as error:  # a page that cannot be made must not end the connection
            return Page(TEXT, f"500 {type(error).__name__}\n".encode(), 500)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write nothing: stderr belongs to the run."""


def is_own_host(host: str, allowed_hosts: Collection[str] = ()) -> bool:
    """Return whether a Host header names this machine: by an address, one of its names, or an allowed one.
    A page on the web can point its own name at 127.0.0.1 and have a browser read what is served here (DNS
    rebinding), but only under that name, which has a dot. "*" allows every name.
    """
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].rstrip(".")
    if "." not in name and ":" not in name:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in allowed_hosts or "*" in allowed_hosts or name in _own_names()
    return True


@functools.cache
def _own_names() -> frozenset[str]:
    return frozenset(name.lower() for name in (socket.gethostname(), socket.getfqdn()))
