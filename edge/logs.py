"""Logs: one JSON object per line on stderr, for an event with a name and fields.

The convention for every package, with nothing to import but the standard library:

    log = logging.getLogger(__name__)
    log.info("session.closed", extra={"fields": {"device": device_id, "reason": "revoked"}})

gives  {"ts": "2026-01-02T03:04:05.678Z", "level": "info", "event": "session.closed", "logger": "registry.sessions",
"device": "…", "reason": "revoked"}.  The message is the event's name, in lower case with dots, and takes no arguments.
A library that logs a sentence shows up as event `log.message` with the sentence as `message`.

Theory. `JsonFormatter` turns a record into bytes at the call, so that what changes afterwards cannot change the line; a
`LineWriter` thread puts the bytes out. The caller never waits for the pipe:

    any thread ── format ──> bounded queue ── writer thread ──> stderr
                                └─ full: the line is dropped and counted, and a later line says how many

What can be lost: lines beyond `MAX_QUEUED_BYTES` while nobody reads stderr, lines in the queue at `kill -9`, and lines
that stderr itself refuses; all but the second are counted in `Logs.dropped`. What cannot happen: an exception out of a
log call, a line in two halves (each goes out whole before the next), a line that untrusted text forged. Output is
ASCII; control characters, line separators and bidirectional overrides in a field are escapes. Sizes are capped per
field and per line; what was cut says so.

Redaction here is the last net, not the rule: the rule is that secrets do not reach a log call. The net masks values of
telling field names, bearer secrets, tokens, private keys, and passwords in URLs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

MAX_TEXT = 2048
"""Characters of one text in a field: a certificate's subject or an error fits, a body does not."""
MAX_LINE = 16 << 10
"""Bytes of one line: what common collectors take whole (the docker driver splits beyond this)."""
MAX_FIELDS = 64
MAX_ITEMS = 32
"""Entries of one list or table inside a field."""
MAX_DEPTH = 4
MAX_FRAMES = 16
"""Innermost frames of a traceback; the outer ones are the loop and the server, always the same."""
MAX_CAUSES = 3
MAX_QUEUED_BYTES = 8 << 20
"""What waits for stderr, about 30,000 usual lines: some seconds of a storm, and no more memory than that."""

MASK = "***"
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+\Z")
_TAKEN = frozenset({"ts", "level", "event", "logger", "exc", "truncated"})
_SECRET_NAMES = frozenset(
    {
        "api_key",
        "authorization",
        "cookie",
        "dsn",
        "key",
        "passphrase",
        "password",
        "private_key",
        "provisioning_key",
        "provision_key",
        "psk",
        "secret",
        "token",
        "x-api-key",
    }
)
# Every repetition is bounded or cannot overlap what follows it, so hostile text costs linear time.
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,30}PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        "-----PRIVATE KEY " + MASK,
    ),
    (re.compile(r"sk_live_[A-Za-z0-9_-]{8,}"), "sk_live_" + MASK),
    (re.compile(r"(?<![A-Za-z0-9])(pk_|rt_)[A-Za-z0-9_-]{16,}"), r"\1" + MASK),
    (re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]*"), "eyJ" + MASK),
    (re.compile(r"AGE-SECRET-KEY-1[A-Z0-9]{8,}"), "AGE-SECRET-KEY-1" + MASK),
    # A password with a raw slash or at-sign is wrong in a URL, and common; for our own scheme err on the masked side.
    (re.compile(r"(postgres(?:ql)?://[^:/@\s]{0,128}:)[^\s]{1,512}@"), r"\1" + MASK + "@"),
    (re.compile(r"([a-z][a-z0-9+.-]{0,20}://[^:/@\s]{0,128}:)[^\s/@]{1,512}@"), r"\1" + MASK + "@"),
    (re.compile(r"(?i)\b(password|passwd|passphrase|secret)(\s?[=:]\s?)[^\s&,;'\"]{1,512}"), r"\1\2" + MASK),
)

# What every pattern above contains: one search spares ordinary text the rest, which is most of the cost of a line.
_SUSPECT = re.compile(r"sk_live_|pk_|rt_|eyJ|-----BEGIN|AGE-SECRET|://|(?i:passw|passphrase|secret)")


class JsonFormatter(logging.Formatter):
    """Turns a record into one line of JSON without its newline; see the convention above."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, ASCII, at most `MAX_LINE` bytes. Raises what a hostile `__str__` raises; the handler counts it."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head: dict[str, object] = {"ts": moment, "level": record.levelname.lower()}
        given = getattr(record, "fields", None)
        fields: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
        if isinstance(record.msg, str) and not record.args and _NAME.match(record.msg):
            head["event"] = record.msg[:MAX_TEXT]
        else:
            head["event"] = "log.message"
            fields = {"message": record.getMessage(), **fields}
        head["logger"] = _text(record.name)
        error = record.exc_info[1] if record.exc_info else None
        return _line(head, fields, _described(error, MAX_CAUSES) if error is not None else None)


class LineWriter:
    """A thread that writes lines to a file descriptor, and a bounded queue in front of it.

    `offer` never blocks and never raises. Made not started: the first line starts the thread.
    """

    def __init__(self, descriptor: int, *, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._descriptor = descriptor
        self._max_queued_bytes = max_queued_bytes
        self._lines: deque[bytes] = deque()
        self._queued_bytes = 0
        self._writing = False
        self._closed = False
        self._dropped = 0
        self._told = 0
        # Reentrant: a signal handler or a finalizer may log while its own thread is in here.
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """Lines lost so far because the queue was full, stderr refused them, or they could not be formatted."""
        return self._dropped

    def offer(self, line: bytes) -> bool:
        """Queue one line (with its newline). False when it was dropped."""
        with self._changed:
            if self._closed or self._queued_bytes + len(line) > self._max_queued_bytes:
                self._dropped += 1
                return False
            self._lines.append(line)
            self._queued_bytes += len(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return True

    def lose(self) -> None:
        """Count a line that never became one."""
        with self._changed:
            self._dropped += 1

    def flush(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until everything queued is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._writing, timeout)

    def close(self, timeout: float) -> None:
        """Take no more lines, and give those queued up to `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            lines, count = batch
            written = self._write(lines)
            with self._changed:
                self._writing = False
                if not written:
                    self._dropped += count
                self._changed.notify_all()

    def _next(self) -> tuple[bytes, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            if not self._lines:
                return None
            taken: list[bytes] = []
            size = 0
            while self._lines and size < 64 << 10:
                taken.append(self._lines.popleft())
                size += len(taken[-1])
            self._queued_bytes -= size
            self._writing = True
            count = len(taken)
            if self._dropped > self._told:
                taken.append(_dropped_line(self._dropped - self._told))
                self._told = self._dropped
            return b"".join(taken), count

    def _write(self, lines: bytes) -> bool:
        view = memoryview(lines)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:
                time.sleep(0.02)  # stderr was made non-blocking by whoever shares it; this thread may wait
            except OSError:
                return False
        return True


class JsonHandler(logging.Handler):
    """Formats at the call, hands the line to a writer. Never raises and never prints by itself."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line. A record that cannot be formatted becomes a line that says so."""
        try:
            line = self.format(record)
        except Exception as error:  # a log call must not raise; the end of the road for a hostile __str__
            self._writer.lose()
            line = _line(
                {"ts": _now(), "level": "error", "event": "log.failed", "logger": _text(record.name)},
                {"error": type(error).__name__, "line": record.lineno},
                None,
            )
        self._writer.offer(line.encode("ascii", "backslashreplace") + b"\n")

    def flush(self) -> None:
        """Give the queue a moment; the interpreter calls this at its end."""
        self._writer.flush(1.0)


class Logs:
    """The logs of the process, from `configure` to `close`."""

    def __init__(self, writer: LineWriter, handler: logging.Handler, former: list[logging.Handler]) -> None:
        self._writer = writer
        self._handler = handler
        self._former = former

    @property
    def dropped(self) -> int:
        """Lines lost so far; for the metrics page."""
        return self._writer.dropped

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued, at most `timeout` seconds, and put the former handlers back."""
        root = logging.getLogger()
        root.removeHandler(self._handler)
        for handler in self._former:
            root.addHandler(handler)
        logging.captureWarnings(False)
        self._writer.close(timeout)

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def configure(level: str = "info", *, descriptor: int = 2) -> Logs:
    """Send the whole process's logs as JSON lines to `descriptor`; `level` is debug, info, warning or error.

    Replaces the root logger's handlers, and catches Python's warnings. Call once, early; `close` before the end.
    """
    root = logging.getLogger()
    former = root.handlers[:]
    for handler in former:
        root.removeHandler(handler)
    writer = LineWriter(descriptor)
    ours = JsonHandler(writer)
    root.addHandler(ours)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    return Logs(writer, ours, former)


def redact(text: str) -> str:
    """`text` with everything that looks like a secret masked."""
    if _SUSPECT.search(text) is None:
        return text
    for pattern, mask in _SECRETS:
        text = pattern.sub(mask, text)
    return text


def _line(head: Mapping[str, object], fields: Mapping[str, Any], error: Mapping[str, object] | None) -> str:
    """The JSON object, fields added while there is room for them."""
    parts = [_member(name, value) for name, value in head.items()]
    tail = [_member("exc", error)] if error is not None else []
    if tail and len(tail[0]) > MAX_LINE // 2:
        assert error is not None
        tail = [_member("exc", {"type": error["type"], "truncated": True})]
    room = MAX_LINE - len('{, "truncated": true}\n') - sum(len(part) + 2 for part in (*parts, *tail))
    truncated = len(fields) > MAX_FIELDS
    for name, value in list(fields.items())[:MAX_FIELDS]:
        part = _field(str(name), value)
        if len(part) + 2 > room:
            truncated = True
            continue
        parts.append(part)
        room -= len(part) + 2
    parts += tail
    if truncated:
        parts.append('"truncated": true')
    return "{" + ", ".join(parts) + "}"


def _field(name: str, value: object) -> str:
    shown = MASK if name.lower() in _SECRET_NAMES and value is not None else _plain(value, MAX_DEPTH)
    return _member(_text(name) + "_" if name in _TAKEN else _text(name), shown)


def _member(name: str, value: object) -> str:
    # JSON leaves DEL as it is; some terminals do not.
    return f"{_encode(name)}: {_encode(value)}".replace("\x7f", "\\u007f")


def _encode(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _plain(value: object, depth: int) -> object:
    """`value` as bounded JSON types."""
    match value:
        case None | bool():
            return value
        case int():
            # Exact in every JSON reader; larger ones are somebody's input. Enums of int, too, become plain.
            return (
                int(value) if -(2**53) <= value <= 2**53 else _text(hex(value) if value.bit_length() < 512 else "huge")
            )
        case float():
            return float(value) if -1e300 < value < 1e300 else _text(str(value))
        case str():
            return _text(value)
        case bytes() | bytearray() | memoryview():
            return f"{len(value)} bytes"  # what they are may be a key
        case Mapping() if depth > 0:
            shown = [
                (str(name), inner)
                for name, inner, _ in zip(value.keys(), value.values(), range(MAX_ITEMS), strict=False)
            ]
            return {
                _text(name): MASK if name.lower() in _SECRET_NAMES and inner is not None else _plain(inner, depth - 1)
                for name, inner in shown
            }
        case list() | tuple() | set() | frozenset() if depth > 0:
            return [_plain(inner, depth - 1) for inner, _ in zip(value, range(MAX_ITEMS), strict=False)]
        case datetime() if value.tzinfo is not None:
            return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        case _:
            return _text(str(value))


def _text(text: str) -> str:
    """Bounded and redacted. Redaction looks a little beyond the cut, so that a secret across it is not left in half."""
    if len(text) > MAX_TEXT:
        return redact(text[: 2 * MAX_TEXT])[:MAX_TEXT] + f"… ({len(text)} characters)"
    return redact(text)


def _described(error: BaseException, causes: int) -> dict[str, object]:
    """An exception as data: its type, message, innermost frames, and what caused it."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
    described: dict[str, object] = {
        "type": f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins."),
        "message": _text(str(error)),
        "trace": [f"{_place(frame.filename)}:{frame.lineno} {frame.name}"[:200] for frame in frames],
    }
    if causes > 0 and isinstance(error, BaseExceptionGroup):
        described["group"] = [_described(inner, causes - 1) for inner in error.exceptions[:MAX_CAUSES]]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if causes > 0 and cause is not None:
        described["cause"] = _described(cause, causes - 1)
    return described


def _place(file: str) -> str:
    """The last three parts of a path: enough to find the file, silent about the machine."""
    return "/".join(file.split("/")[-3:])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _dropped_line(count: int) -> bytes:
    return (_line({"ts": _now(), "level": "warning", "event": "log.dropped"}, {"lines": count}, None) + "\n").encode()
