"""A log line is one JSON object whatever is logged, shows no secret, and never holds anybody up."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import logs
from edge.logs import JsonFormatter, JsonHandler, LineWriter, redact
from registry.secrets import Secret

KEY = "sk_live_" + "aB3_" * 10 + "xyz"
formatter = JsonFormatter()


def record(message: object, *args: object, error: BaseException | None = None, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("registry.sessions", logging.INFO, __file__, 1, message, args, None)
    if error is not None:
        made.exc_info = (type(error), error, error.__traceback__)
    made.fields = fields
    made.created = 1767323045.678
    return made


def line(message: object, *args: object, error: BaseException | None = None, **fields: Any) -> dict[str, Any]:
    written = formatter.format(record(message, *args, error=error, **fields))
    assert written.isascii()
    assert written.isprintable()
    assert len(written) < logs.MAX_LINE
    read: dict[str, Any] = json.loads(written)
    return read


class Colour(Enum):
    RED = "red"


class TestLines:
    def test_an_event_is_a_name_and_fields(self) -> None:
        assert line("session.closed", reason="revoked", after_ms=12) == {
            "ts": "2026-01-02T03:04:05.678Z",
            "level": "info",
            "event": "session.closed",
            "logger": "registry.sessions",
            "reason": "revoked",
            "after_ms": 12,
        }

    def test_a_sentence_of_a_library_is_a_message(self) -> None:
        read = line("Task %r took %.1f s", "x", 2.0)
        assert (read["event"], read["message"]) == ("log.message", "Task 'x' took 2.0 s")

    def test_values_become_json(self) -> None:
        device = uuid.UUID(int=5)
        read = line(
            "a.b", id=device, at=datetime(2026, 1, 1, tzinfo=UTC), nan=float("nan"), big=2**70, huge=10**5000,
            raw=b"key", colour=Colour.RED, none=None, yes=True, many=range(3), table={"a": {"b": [1, (2,)]}},
        )  # fmt: skip
        assert read["id"] == str(device)
        assert read["at"] == "2026-01-01T00:00:00.000Z"
        assert (read["nan"], read["big"], read["huge"]) == ("nan", hex(2**70), "huge")
        assert read["raw"] == "3 bytes"
        assert (read["colour"], read["none"], read["yes"]) == ("Colour.RED", None, True)
        assert read["table"] == {"a": {"b": [1, [2]]}}

    def test_a_field_cannot_take_the_place_of_the_event(self) -> None:
        read = line("a.b", event="forged", ts="never", level="none")
        assert (read["event"], read["level"], read["event_"]) == ("a.b", "info", "forged")

    @pytest.mark.parametrize(
        "text", ['x"}\n{"event":"forged"}', "\u2028\u2029\x85\r\n", "\x1b[2J\x7f\x9b", "\u202e\ud800\0"]
    )
    def test_untrusted_text_stays_inside_its_field(self, text: str) -> None:
        read = line("a.b", name=text, **{text: 1})
        assert read["name"] == text
        assert read["event"] == "a.b"

    def test_an_exception_is_data_with_its_causes(self) -> None:
        try:
            try:
                raise KeyError("inner")
            except KeyError as inner:
                raise ValueError("outer") from inner
        except ValueError as error:
            read = line("task.failed", error=error)["exc"]
        assert (read["type"], read["message"], read["cause"]["type"]) == ("ValueError", "outer", "KeyError")
        assert read["trace"][-1].endswith("test_an_exception_is_data_with_its_causes")
        assert not read["trace"][-1].startswith("/")

    def test_deep_and_grouped_exceptions_stay_bounded(self) -> None:
        def dive(depth: int) -> None:
            if depth == 0:
                raise ExceptionGroup("\0" * 10_000, [RuntimeError("\0" * 10_000) for _ in range(50)])
            dive(depth - 1)

        with pytest.raises(ExceptionGroup) as caught:
            dive(200)
        assert line("task.failed", error=caught.value, kept=1)["kept"] == 1

    def test_what_is_too_much_is_cut_and_says_so(self) -> None:
        read = line("a.b", **{f"f{n}": "x" * 10_000 for n in range(200)})
        assert read["truncated"] is True
        assert read["f0"].endswith("… (10000 characters)")
        assert line("a.b", items=list(range(1000)))["items"] == list(range(logs.MAX_ITEMS))

    def test_a_table_that_holds_itself(self) -> None:
        table: dict[str, object] = {}
        table["self"] = table
        assert line("a.b", table=table)["event"] == "a.b"

    json_like = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )

    @given(fields=st.dictionaries(st.text(), json_like, max_size=6), message=st.text())
    def test_any_record_is_one_line_of_json(self, fields: dict[str, object], message: str) -> None:
        made = record(message)
        made.fields = fields
        written = formatter.format(made)
        assert written.isascii()
        assert written.isprintable()
        assert isinstance(json.loads(written), dict)


class TestRedaction:
    @pytest.mark.parametrize(
        "text",
        [
            KEY,
            f"Bearer {KEY}, again {KEY}",
            "pk_" + "A" * 43,
            "claim with 'rt_" + "-_9" * 14 + "'",
            "postgres://gate:" + KEY + "@db/g",
            f"nats://u:{KEY[8:]}@h",
            "-----BEGIN PRIVATE KEY-----\n" + KEY[8:] + "\n-----END PRIVATE KEY-----\n",
            "-----BEGIN EC PRIVATE KEY-----\\n" + KEY[8:],
            "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ4In0." + KEY[8:],
            "AGE-SECRET-KEY-1" + "Q" * 58,
            f"user=x password={KEY[8:]} host=y",
            "x" * 2040 + KEY,
        ],
    )
    def test_what_looks_like_a_secret_is_masked_wherever_it_stands(self, text: str) -> None:
        secret_part = max((p for p in (KEY[8:], "A" * 20, "-_9" * 8, "Q" * 20) if p in text), key=len)
        error = RuntimeError(text)
        written = formatter.format(record("a.b", error=error, value=text, nested=[{"x": text}], **{text: 1}))
        assert secret_part[:12] not in written
        assert secret_part[:12] not in formatter.format(record("saw %s", text))

    def test_a_password_with_slashes_and_at_signs(self) -> None:
        assert (
            redact("cannot reach postgres://gate:p/w@rd@db.example/g now")
            == "cannot reach postgres://gate:***@db.example/g now"
        )

    def test_telling_names_are_masked_whatever_they_hold(self) -> None:
        read = line("a.b", psk="abc", Authorization="Basic eA==", nested={"api_key": "x"}, api_key_id="kept", key=None)
        assert (read["psk"], read["Authorization"], read["nested"]["api_key"]) == ("***", "***", "***")
        assert (read["api_key_id"], read["key"]) == ("kept", None)

    def test_a_secret_shows_nothing(self) -> None:
        assert "hidden" not in formatter.format(
            record("a.b", value=Secret("hidden"), error=ValueError(Secret("hidden")))
        )

    @pytest.mark.parametrize(
        "text", ["uplinks_pk_tenant", "start_report_2026", "https://h:8443/x", "a:b@c", "part_of_it"]
    )
    def test_ordinary_text_is_left_alone(self, text: str) -> None:
        assert redact(text) == text

    @pytest.mark.parametrize(
        "piece", ["postgres://a:", "-----BEGIN PRIVATE KEY-----", "a://b:", "eyJ" + "a" * 9 + ".", "password="]
    )
    def test_hostile_text_costs_little(self, piece: str) -> None:
        text = (piece * 5000)[: 2 * logs.MAX_TEXT]
        started = time.process_time()
        redact(text)
        assert time.process_time() - started < 0.5


class Pipe:
    """A pipe whose reading end the test holds."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)

    def everything(self) -> bytes:
        got = b""
        try:
            while chunk := os.read(self.read_end, 1 << 16):
                got += chunk
        except BlockingIOError:
            pass
        return got

    def close(self) -> None:
        for end in (self.read_end, self.write_end):
            os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class TestWriter:
    def test_lines_arrive_whole_and_in_order(self, pipe: Pipe) -> None:
        writer = LineWriter(pipe.write_end)
        for n in range(100):
            assert writer.offer(b"%d\n" % n)
        assert writer.flush(10)
        assert pipe.everything() == b"".join(b"%d\n" % n for n in range(100))
        writer.close(5)

    def test_a_reader_that_does_not_read_holds_nobody_up(self, pipe: Pipe) -> None:
        writer = LineWriter(pipe.write_end, max_queued_bytes=256 << 10)
        handler = JsonHandler(writer)
        for n in range(3000):  # far more than pipe and queue hold together
            handler.emit(record("storm.line", n=n, pad="x" * 200))
        assert writer.dropped > 0
        got = b""

        def emptied() -> bool:
            nonlocal got
            got += pipe.everything()
            return writer.flush(0)

        until(emptied)
        handler.emit(record("after.storm"))
        until(lambda: writer.flush(0.01))
        events = [json.loads(one) for one in (got + pipe.everything()).splitlines()]
        told = sum(event["lines"] for event in events if event["event"] == "log.dropped")
        assert told == writer.dropped
        assert sum(event["event"] == "storm.line" for event in events) + told == 3000
        writer.close(5)

    def test_closing_does_not_wait_for_ever(self, pipe: Pipe) -> None:
        writer = LineWriter(pipe.write_end)
        writer.offer(b"x" * (4 << 20))
        writer.close(0.05)
        assert not writer.offer(b"late\n")
        os.set_blocking(pipe.read_end, True)
        left = 4 << 20
        while left:
            left -= len(os.read(pipe.read_end, 1 << 16))
        assert writer.flush(10)

    def test_a_closed_stderr_is_counted_not_raised(self) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        writer = LineWriter(write_end)
        assert writer.offer(b"lost\n")
        until(lambda: writer.dropped == 1)
        writer.close(5)
        os.close(write_end)

    def test_a_nonblocking_stderr_loses_nothing(self, pipe: Pipe) -> None:
        os.set_blocking(pipe.write_end, False)
        writer = LineWriter(pipe.write_end)
        writer.offer(b"x" * (1 << 20))
        got = 0

        def read_all() -> bool:
            nonlocal got
            got += len(pipe.everything())
            return got == 1 << 20

        until(read_all)
        writer.close(5)

    def test_many_threads_never_mix_their_lines(self, pipe: Pipe) -> None:
        writer = LineWriter(pipe.write_end)
        handler = JsonHandler(writer)
        threads = [
            threading.Thread(target=lambda: [handler.emit(record("a.b", n=n)) for n in range(100)]) for _ in range(4)
        ]
        got = b""
        for thread in threads:
            thread.start()

        def done() -> bool:
            nonlocal got
            got += pipe.everything()
            return got.count(b"\n") == 400

        until(done)
        for thread in threads:
            thread.join()
        assert all(json.loads(one)["event"] == "a.b" for one in got.splitlines())
        writer.close(5)


class TestProcess:
    def test_configure_takes_the_root_logger_and_gives_it_back(self, pipe: Pipe) -> None:
        root = logging.getLogger()
        before, level = root.handlers[:], root.level
        try:
            with logs.configure("warning", descriptor=pipe.write_end):
                logging.getLogger("registry.x").info("not.shown")
                logging.getLogger("registry.x").warning("is.shown", extra={"fields": {"a": 1}})
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    warnings.warn("careful", stacklevel=1)
        finally:
            root.setLevel(level)
        assert root.handlers == before
        first, second = (json.loads(one) for one in pipe.everything().splitlines())
        assert (first["event"], first["a"]) == ("is.shown", 1)
        assert (second["event"], second["logger"]) == ("log.message", "py.warnings")

    def test_a_record_that_cannot_be_formatted_is_counted_and_said(self, pipe: Pipe) -> None:
        class Hostile:
            def __str__(self) -> str:
                raise RuntimeError(KEY)

        writer = LineWriter(pipe.write_end)
        JsonHandler(writer).emit(record("a.b", value=Hostile()))
        JsonHandler(writer).emit(record("%d sheep", "no number"))
        writer.close(5)
        events = [json.loads(one) for one in pipe.everything().splitlines()]
        assert [event["event"] for event in events if event["event"] != "log.dropped"] == ["log.failed"] * 2
        assert writer.dropped == 2

    def test_the_end_of_the_interpreter_writes_what_is_queued(self) -> None:
        import subprocess

        code = "from edge import logs; import logging; logs.configure(); logging.getLogger('x').info('last.words')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
        assert json.loads(done.stderr)["event"] == "last.words"
