"""The ops port: `/livez`, `/readyz`, `/metrics` in plain HTTP/1.1, apart from everything that devices can reach.

Theory. A server of its own, with nothing of the application in it: when the application is saturated or wedged on the
database, this one still answers, as long as the event loop turns. It knows one kind of connection,

    accept ── one request head, ≤ 4 KiB, within 5 s ── one answer ── close

and keeps at most 32 of them; one more is closed at once, which a prober counts as a failure and tries again. A body is
never read. There is no keep-alive: a scrape every few seconds gains nothing from it, and an idle connection would hold
one of the 32 places.

- `/livez`: 200 while the event loop turns. Restart the process when it does not answer.
- `/readyz`: 200 when every named check is well, else 503; JSON says which is not, and why. Send no new peers here.
- `/metrics`: the Prometheus text format.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from edge.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger(__name__)

MAX_HEAD = 4096
"""Bytes of request line and headers: a prober sends 200."""
MAX_CONNECTIONS = 32
"""At once; probers and one or two scrapers are far fewer."""
DEADLINE = 5.0
"""Seconds for the whole exchange, reading and writing. Kubernetes' probes give up after 1."""

JSON_TYPE = "application/json"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One named check of readiness; `reason` says what is wrong, in words that may be shown to anybody on this host."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: HTTPStatus
    content_type: str
    body: bytes
    allow: str = ""


class OpsServer:
    """Serves the three pages. `readiness` is called for each `/readyz`, must be quick, and reports by check name."""

    def __init__(
        self, metrics: Metrics, readiness: Callable[[], Mapping[str, CheckResult]], *, deadline: float = DEADLINE
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._deadline = deadline
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port, which differs from `port` when that is 0. Raises OSError when it is taken."""
        assert self._server is None, "started already"
        self._server = await asyncio.start_server(self._accept, host, port, limit=MAX_HEAD)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop listening and end what is open. Harmless when it never started."""
        if self._server is None:
            return
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._deadline):
                await self._exchange(reader, writer)
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # a peer that is slow or gone is not news
        except Exception:  # the end of a connection task
            log.exception("ops.failed")
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            refusal = _error(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "INVALID_ARGUMENT", f"at most {MAX_HEAD} bytes"
            )
            writer.write(_encoded(refusal, with_body=True))
        else:
            writer.write(self._answer_to(head))
        await writer.drain()

    def _answer_to(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0"):
            return _encoded(_error(HTTPStatus.BAD_REQUEST, "INVALID_ARGUMENT", "HTTP/1.1 only"), with_body=True)
        if method not in (b"GET", b"HEAD"):
            refusal = _error(HTTPStatus.METHOD_NOT_ALLOWED, "INVALID_ARGUMENT", "GET and HEAD only", allow="GET, HEAD")
            return _encoded(refusal, with_body=True)
        return _encoded(self._page(target.partition(b"?")[0]), with_body=method == b"GET")

    def _page(self, path: bytes) -> Answer:
        match path:
            case b"/livez":
                return Answer(HTTPStatus.OK, JSON_TYPE, b'{"status": "alive"}\n')
            case b"/readyz":
                return _readiness_page(self._readiness())
            case b"/metrics":
                return Answer(HTTPStatus.OK, CONTENT_TYPE, self._metrics.render())
            case _:
                return _error(HTTPStatus.NOT_FOUND, "NOT_FOUND", "here are /livez, /readyz and /metrics")


def _readiness_page(checks: Mapping[str, CheckResult]) -> Answer:
    ready = all(check.ok for check in checks.values())
    shown = {
        name: {"ok": check.ok} | ({"reason": check.reason} if check.reason else {}) for name, check in checks.items()
    }
    body = json.dumps({"status": "ready" if ready else "not_ready", "checks": shown})
    return Answer(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, JSON_TYPE, body.encode() + b"\n")


def _error(status: HTTPStatus, code: str, message: str, *, allow: str = "") -> Answer:
    body = json.dumps({"code": code, "message": message, "correlation_id": secrets.token_hex(16)})
    return Answer(status, JSON_TYPE, body.encode() + b"\n", allow)


def _encoded(answer: Answer, *, with_body: bool) -> bytes:
    """The answer on the wire; a HEAD gets the same headers and no body (RFC 9110 §9.3.2)."""
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *([f"Allow: {answer.allow}"] if answer.allow else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (answer.body if with_body else b"")
