"""A small HTTPS client for our own API, as a device or an operator's script would be one: standard library only.

Theory. One `ApiClient` is one TLS connection that is kept alive over many requests; it is made at the first request
and again after it was closed. It trusts the given CA chain and checks the server's name. It blocks, so it is used from
threads. An HTTP error is an answer like any other: who asks knows what to expect.

What can race: the server may close an idle connection at any time. A request on it then raises `ConnectionClosed`; it
is not repeated by itself, because only the caller knows whether repeating is harmless.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BASE = "/api/v1"
TIMEOUT_SECONDS = 30.0


class ConnectionClosed(Exception):
    """The server ended the connection before it answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its status, its body (decoded JSON, or text for another type), and how long it took."""

    status: int
    body: Any
    milliseconds: float

    def __repr__(self) -> str:
        return f"Answer(status={self.status})"  # the body may hold a key that was just made


class ApiClient:
    """One keep-alive connection to `https://host:port/api/v1`. Not for several threads at once."""

    def __init__(
        self,
        host: str,
        port: int,
        ca_chain: Path,
        *,
        certificate: Path | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        """`ca_chain` is a PEM file; `certificate` one with our own certificate and its key, to be shown to the server.

        Raises OSError if one cannot be read, ssl.SSLError if it does not hold what it should.
        """
        context = ssl.create_default_context(cafile=str(ca_chain))
        if certificate is not None:
            context.load_cert_chain(certificate)
        self._connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """Whether the connection of the last request is still ours to use."""
        return self._connection.sock is not None

    def get(self, path: str, *, bearer: str | None = None) -> Answer:
        """GET below the base path."""
        return self.request("GET", path, bearer=bearer)

    def post(self, path: str, body: object = None, *, bearer: str | None = None) -> Answer:
        """POST a JSON body below the base path."""
        return self.request("POST", path, body, bearer=bearer)

    def delete(self, path: str, *, bearer: str | None = None) -> Answer:
        """DELETE below the base path."""
        return self.request("DELETE", path, bearer=bearer)

    def request(self, method: str, path: str, body: object = None, *, bearer: str | None = None) -> Answer:
        """One request and its answer. Raises ConnectionClosed, OSError (also for a certificate not trusted)."""
        since = time.perf_counter()
        self._send(method, path, body, bearer)
        try:
            response = self._connection.getresponse()
            raw = response.read()  # with a size it would take half an answer for a whole one
        except (http.client.HTTPException, ConnectionError) as error:
            self.close()
            raise ConnectionClosed(f"{method} {path}: {type(error).__name__}") from None
        milliseconds = (time.perf_counter() - since) * 1000
        kind = response.headers.get_content_type()
        decoded = json.loads(raw) if kind == "application/json" and raw else raw.decode("utf-8", "replace")
        return Answer(response.status, decoded, milliseconds)

    def send_and_vanish(self, method: str, path: str, body: object = None, *, bearer: str | None = None) -> None:
        """Send a request, wait until its answer has arrived, and drop it with the connection: a lost answer."""
        self._send(method, path, body, bearer)
        try:
            self._connection.getresponse()
        finally:
            self.close()

    def closed_by_server(self, within: float) -> float | None:
        """Milliseconds until the server closes the idle connection; None if it does not within so many seconds."""
        stream = self._connection.sock
        if stream is None:
            return 0.0
        since = time.perf_counter()
        stream.settimeout(within)
        try:
            while stream.recv(4096):
                pass  # whatever it still says, it is about to go
        except TimeoutError:
            return None
        except OSError:
            pass  # a reset is an end, too
        finally:
            self.close()
        return (time.perf_counter() - since) * 1000

    def close(self) -> None:
        """Close the connection; the next request makes a new one."""
        self._connection.close()

    def _send(self, method: str, path: str, body: object, bearer: str | None) -> None:
        headers = {"Accept": "application/json"}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer}"
        try:
            self._connection.request(method, BASE + path, content, headers)
        except (ConnectionError, ssl.SSLError) as error:
            self.close()
            raise ConnectionClosed(f"{method} {path}: {type(error).__name__}") from None
