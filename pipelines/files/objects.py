"""Read objects of a bucket or a web server by obstore, patiently, from any number of threads.

No text of obstore or of a server is printed: it may hold keys. Credentials come from where the
clouds' own tools have them: environment, profile (with boto3 installed), or the machine's role.
"""

import collections
import importlib.util
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import thread as pools
from datetime import timedelta
from typing import Any, TypeVar

from pipelines.spec import DataError

PATIENCE_SECONDS = 300.0  # a request fails for good when it has failed for this long
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 20.0  # before another try: doubled each time, with jitter
REQUEST_SECONDS = 30  # for one answer
TRIES_IF_WRONG = 4  # of bytes that arrive, but are not what the index promises
LATER = {408, 425, 429}  # the only answers 4xx after which the same request may succeed

# Of this process, since it began: requests, bytes and, by reason, retries. Metrics show them.
COUNTS: collections.Counter[str] = collections.Counter()
REASONS = ("failed", "corrupt")
_counting = threading.Lock()  # += is two steps

T = TypeVar("T")


class Store:
    """The objects below a URL."""

    def __init__(self, url: str) -> None:
        from obstore.store import from_url

        self._url = url
        options: dict[str, Any] = {
            "client_options": {"allow_http": True, "timeout": f"{REQUEST_SECONDS}s"},
            # Tries are ours: obstore would hide them from the metrics.
            "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)},
        }
        has_keys = "AWS_ACCESS_KEY_ID" in os.environ
        if url.startswith("s3://") and not has_keys and importlib.util.find_spec("boto3"):
            from obstore.auth.boto3 import Boto3CredentialProvider

            options["credential_provider"] = Boto3CredentialProvider()
        try:
            self._store = from_url(url, **options)
        except Exception as error:
            raise DataError(f"{url}: cannot be opened as a bucket ({type(error).__name__})") from None

    def read(self, name: str, tag: str | None) -> tuple[bytes, str | None] | None:
        """Return an object and the tag of its version, or None where that is still `tag`.
        Raises DataError: it is not there, may not be read, or could not be for PATIENCE_SECONDS.
        """
        import obstore

        def get() -> tuple[bytes, str | None] | None:
            try:
                result = obstore.get(self._store, name, options={"if_none_match": tag} if tag else {})
            except obstore.exceptions.NotModifiedError:
                return None
            return bytes(result.bytes()), result.meta["e_tag"]

        return self._patiently(get, name)

    def read_range(
        self, name: str, begin: int, end: int, is_right: Callable[[bytes], bool]
    ) -> tuple[bytes, bool]:
        """Return the bytes `begin` to `end` of an object, and whether they are right.
        They are asked for TRIES_IF_WRONG times. Raises DataError as `read`.
        """
        import obstore

        content = b""
        for number in range(TRIES_IF_WRONG):
            if number:
                _count("corrupt")
                _pause(FIRST_WAIT_SECONDS * 2**number)
            get = lambda: bytes(obstore.get_range(self._store, name, start=begin, end=end))  # noqa: E731
            content = self._patiently(get, name)
            _count("bytes", len(content))
            if len(content) == end - begin and is_right(content):
                return content, True
        return content, False

    def _patiently(self, request: Callable[[], T], name: str) -> T:
        began, wait = time.monotonic(), FIRST_WAIT_SECONDS
        while True:
            _count("requests")
            try:
                return request()
            except Exception as error:
                what, may_recover = _meaning(error)
                if not may_recover or time.monotonic() - began > PATIENCE_SECONDS or is_ending():
                    raise DataError(f"{self._url}/{name}: {what}") from None
            _count("failed")
            _pause(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def is_ending() -> bool:
    """Return whether Python waits for the threads of its pools, to end."""
    return bool(getattr(pools, "_shutdown", False))


def _count(name: str, number: int = 1) -> None:
    with _counting:
        COUNTS[name] += number


def _pause(seconds: float) -> None:
    end = time.monotonic() + seconds * random.uniform(0.5, 1.5)  # noqa: S311 - jitter is no secret
    while (left := end - time.monotonic()) > 0 and not is_ending():
        time.sleep(min(left, 0.2))


def _meaning(error: Exception) -> tuple[str, bool]:
    """Return what an error means, without a word of the server's, and whether to ask again."""
    text = str(error)
    found = re.search(r"status code: (\d{3})", text)
    status = int(found[1]) if found else 0
    if isinstance(error, FileNotFoundError):
        return "is not there; copy to it what `cmtrain data pack` wrote", False
    is_refused = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    if is_refused or status in (301, 307, 400, 401, 403) or re.search(r"(?i)redirect|credential", text):
        why = "credentials are missing, have expired or lack the right to read, or AWS_REGION is another"
        return f"the store refuses to give it{f' (HTTP {status})' if status else ''}: {why}", False
    if status == 416:
        return "is shorter than in its index; replace it in the bucket", False
    if 400 <= status < 500 and status not in LATER:
        return f"the store refuses the request (HTTP {status})", False
    why = f"HTTP {status}" if status else "no whole answer"
    tried = f"the store has failed for {PATIENCE_SECONDS / 60:.0f} minutes ({why})"
    return f"{tried}; nothing was left out: run the same command again", True
