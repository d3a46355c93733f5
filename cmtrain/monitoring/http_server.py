"""Serve a few pages about a run over HTTP, so cheaply that no number of clients slows training down.

One thread with an event loop serves everybody, and answers a limited number of requests per second.
prometheus_client's own server starts one thread per connection and makes its page for every request. Each of
those threads takes the interpreter's lock from the training thread, which gives it up at every torch call.

Only the paths in `routes` are served. No path is ever looked up on a disk.
"""

import asyncio
import contextlib
import errno
import functools
import io
import ipaddress
import math
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

PORT_ATTEMPTS = 32
CLOSE_GRACE_SECONDS = 0.05  # time for just-closed connections to leave the count
MAX_CONNECTIONS = 32
MAX_HEAD_BYTES = 8192  # request line and headers
TIMEOUT_SECONDS = 5.0  # for a request to arrive, and for its answer to be sent
WATCHED_SECONDS = 5.0  # a page that somebody looks at was asked for this recently
LINGER_SECONDS = 2.2  # the live page asks again after 2
END_OF_HEAD = b"\r\n\r\n"

# A turn is one request, with its connection if that is new. It takes 0.4 ms on a slow core, so the server
# holds the interpreter's lock for 8 % of the time at most. A scraper needs one turn per scrape.
TURNS_PER_SECOND = 200
TURNS_AT_ONCE = 50

TEXT, JSON = "text/plain; charset=utf-8", "application/json"
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Page(NamedTuple):
    content_type: str
    body: bytes
    status: int = 200


# Makes a page for a request's Accept header. Runs on the server's thread.
Route = Callable[[str], Page]
Routes = Mapping[str, Route]


class Exporter:
    """Serves `routes` (pages by path) at `host` (a name, IPv4 or IPv6) from a daemon thread until `close`.

    `port`: the first of PORT_ATTEMPTS ports to try. `allowed_hosts`: see is_own_host. Of MAX_CONNECTIONS
    (HTTP/1.1), a new one replaces the one that has been silent for longest: connections that never send a
    request cannot keep a scraper out.
    Raises OSError: none of the ports is free, or `host` is no address of this machine.
    """

    def __init__(self, routes: Routes, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> None:
        self.routes, self.allowed_hosts = routes, frozenset(name.lower() for name in (host, *allowed_hosts))
        self.listener = _listen(host, port)
        self.host, self.port = host, int(self.listener.getsockname()[1])
        # Connections that wait for a request, the longest-waiting one first: a dict keeps its order.
        self.idle: dict[asyncio.Task[None], None] = {}
        self.num_connections = 0
        self.turns_taken_until = 0.0
        self.asked_at: dict[str, float] = {}  # path -> when the newest answered request for it came
        self.answered = threading.Condition()
        self.loop = asyncio.new_event_loop()
        self.serving = self.loop.create_task(self._serve())
        self.thread = threading.Thread(target=self._run, name="exporter", daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """`http://host:port`, without a slash at the end."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def linger(self, path: str) -> None:
        """Wait until a watched page is asked for once more: LINGER_SECONDS at most, or until Ctrl-C."""
        now = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt), self.answered:
            if now - self.asked_at.get(path, -math.inf) < WATCHED_SECONDS:
                self.answered.wait_for(lambda: self.asked_at[path] >= now, LINGER_SECONDS)

    def close(self) -> None:
        """Close all connections and end the thread."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.serving.cancel)
            self.thread.join()
        self.listener.close()

    def _run(self) -> None:
        with contextlib.closing(self.loop), contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.serving)

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as connections:
            while True:
                await self._wait_for_turn()
                try:
                    connection, _ = await self.loop.sock_accept(self.listener)
                except OSError:  # the client is gone already, or this process has no file descriptor left
                    await asyncio.sleep(1)
                    continue
                if self.num_connections >= MAX_CONNECTIONS and not self._drop_longest_idle():
                    await asyncio.sleep(CLOSE_GRACE_SECONDS)
                    if self.num_connections >= MAX_CONNECTIONS:
                        connection.close()
                        continue
                self.num_connections += 1
                task = connections.create_task(self._answer_requests(connection))
                self.idle[task] = None
                task.add_done_callback(functools.partial(self._forget, connection))

    def _forget(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        connection.close()
        self.num_connections -= 1
        self.idle.pop(task, None)

    def _drop_longest_idle(self) -> bool:
        """Return whether there was a silent connection to drop."""
        if not self.idle:
            return False
        task = next(iter(self.idle))
        del self.idle[task]
        return task.cancel()

    async def _answer_requests(self, connection: socket.socket) -> None:
        """Answer the requests of one connection until the client leaves or is too slow."""
        try:
            reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_HEAD_BYTES)
            writer.transport.set_write_buffer_limits(0)  # drain() returns when everything is sent
            try:
                keep_open = True
                while keep_open:
                    async with asyncio.timeout(TIMEOUT_SECONDS):
                        head = await self._read_head(reader)
                    begun = time.monotonic()
                    answer, keep_open = answer_to(head, self.routes, self.allowed_hosts)
                    writer.write(answer)
                    async with asyncio.timeout(TIMEOUT_SECONDS):
                        await writer.drain()
                    with self.answered:
                        words = (head or b"").decode("latin-1").split(" ", 2)
                        paths = {word.partition("?")[0] for word in words[1:2]} & self.routes.keys()
                        self.asked_at |= dict.fromkeys(paths, begun)
                        self.answered.notify_all()
                    if keep_open:
                        await self._wait_for_turn()
            finally:
                writer.transport.abort()  # does not wait for a client that reads nothing
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass

    async def _read_head(self, reader: asyncio.StreamReader) -> bytes | None:
        """Return request line and headers, None if they are too long."""
        task = asyncio.current_task()
        assert task is not None
        self.idle[task] = None
        try:
            return await reader.readuntil(END_OF_HEAD)
        except asyncio.LimitOverrunError:
            return None
        finally:
            self.idle.pop(task, None)

    async def _wait_for_turn(self) -> None:
        """Wait for the next free turn; requests get theirs in the order in which they ask."""
        now = time.monotonic()
        self.turns_taken_until = max(self.turns_taken_until, now) + 1 / TURNS_PER_SECOND
        await asyncio.sleep(self.turns_taken_until - now - TURNS_AT_ONCE / TURNS_PER_SECOND)


def answer_to(head: bytes | None, routes: Routes, allowed_hosts: Collection[str] = ()) -> tuple[bytes, bool]:
    """Return the answer to a request, and whether its connection stays open for another one.

    `head`: request line and headers with the empty line at their end; None if they were too long.
    """
    if head is None:
        return TOO_LONG, False
    exchange = _Exchange(head, routes, allowed_hosts)
    return exchange.sent.getvalue(), not exchange.close_connection


class _Exchange(BaseHTTPRequestHandler):
    """One request and its answer in memory: the standard library's handler without its socket."""

    protocol_version, default_request_version = "HTTP/1.1", "HTTP/1.0"
    server_version, sys_version = "cmtrain", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", TEXT

    def __init__(self, head: bytes, routes: Routes, allowed_hosts: Collection[str]) -> None:
        self.allowed_hosts = allowed_hosts
        self.rfile, self.sent = io.BytesIO(head), io.BytesIO()
        self.wfile = self.sent
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():  # otherwise it has answered with an error
            self._answer(routes)

    def _answer(self, routes: Routes) -> None:
        hosts = self.headers.get_all("Host", [])
        if not all(is_own_host(host, self.allowed_hosts) for host in hosts):
            page = Page(
                JSON, b'{"error": "Host is no name of this machine; see metrics.allowed_hosts"}\n', 403
            )
        elif self.command not in ("GET", "HEAD"):
            page = Page(TEXT, b"405 only GET and HEAD\n", 405)
        elif route := routes.get(self.path.partition("?")[0]):
            try:
                page = route(self.headers.get("Accept", ""))
            except Exception as error:  # a page that cannot be made must not end the server
                page = Page(TEXT, f"500 {type(error).__name__}\n".encode(), 500)
        else:
            page = Page(TEXT, b"404 no such page\n", 404)
        # A body follows the head, and nothing here reads it: the next request cannot be found.
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.close_connection = self.close_connection or has_body or page.status == 405
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if page.status == 405:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

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


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, (address, *_) = found[0]
    dual = host == "::" and socket.has_dualstack_ipv6()
    last = min(port + PORT_ATTEMPTS - 1, 65535)
    for candidate in range(port, last + 1):
        try:
            listener = socket.create_server((str(address), candidate), family=family, dualstack_ipv6=dual)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        listener.setblocking(False)
        return listener
    raise OSError(f"metrics.port: {port}..{last} are all in use")
