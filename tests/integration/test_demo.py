"""The demo as a newcomer meets it: its story, its exit codes, and every command it prints."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge import demo
from edge.config import load
from edge.demo_steps import Step, Story, Unexpected

ROOT = Path(__file__).resolve().parents[2]
FREE_PORTS = {
    "GATEHOUSE_HTTPS__PORT": "0",
    "GATEHOUSE_MQTT__PORT": "0",
    "GATEHOUSE_COAP__PORT": "0",
    "GATEHOUSE_OPS__PORT": "0",
}


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEHOUSE_")}
    return {**kept, "PYTHONPATH": str(ROOT), **FREE_PORTS, **more}


def _demo(place: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge", "demo", *words],
        cwd=place,
        env=_environment(**more),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@contextmanager
def _serving_demo(place: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A demo that has told its story and goes on serving, and what it said."""
    with subprocess.Popen(
        [sys.executable, "-m", "edge", "demo"],
        cwd=place,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Serving."):
                    break
            yield process, "".join(lines)
        finally:
            process.kill()


def test_the_story_holds_is_readable_when_piped_and_can_be_told_again(tmp_path: Path) -> None:
    for _ in range(2):
        told = _demo(tmp_path, "--once")
        assert (told.returncode, told.stderr) == (0, "")
        for word in (
            "ALREADY_EXISTS",
            'api_key ""',
            "answer lost",
            "uplinks stored",
            "both keys work",
            "ms after the revocation, remaining 0",
            "end of stream",
            "401 UNAUTHENTICATED",
            "timeline: auth.refused (",
            "over mutual TLS",
            "revoked by fingerprint: closed",
            "provision/response, to this connection alone",
            "revoked while connected: DISCONNECT 0x98",
            "NOT_AUTHORIZED 0x87",
            "revoked: close_notify",
            "its next handshake fails, exactly as with a wrong key",
            f"All {len(demo.STEPS)} steps held.",
        ):
            assert word in told.stdout
        assert "\x1b" not in told.stdout
        assert "export" not in told.stdout
    assert (tmp_path / "gatehouse-data" / "ca-chain.pem").is_file()


def test_a_busy_port_is_replaced_and_mentioned(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        told = _demo(tmp_path, "--once", "--data-dir", "d", GATEHOUSE_HTTPS__PORT=str(port))
    assert (told.returncode, told.stderr) == (0, "")
    assert f"port {port} (https) is in use, so a free one was taken" in told.stdout
    assert (tmp_path / "d").is_dir()


def test_the_printed_commands_work_when_pasted_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None or shutil.which("curl") is None:
        pytest.skip("bash and curl are needed")
    with _serving_demo(tmp_path) as (process, said):
        exports = [line for line in said.splitlines() if line.startswith("export ")]
        assert len(exports) == 5, said
        pasted = dict(re.findall(r"^# (.+)\n((?:curl|\S*gatehouse).+)$", said, re.MULTILINE))
        assert len(pasted) == len(demo.pastes(Path("d"), "gatehouse"))
        gatehouse = f"{sys.executable} -m edge"

        def paste(what: str, seconds: float = 30) -> str:
            command = re.sub(r"^\S*gatehouse(?= device)", gatehouse, pasted[what])
            script = "\n".join([*exports, command])
            try:
                done = subprocess.run(
                    [bash, "-c", script],
                    capture_output=True, text=True, timeout=seconds, env=_environment(), cwd=tmp_path, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as still_going:
                return (still_going.stdout or b"").decode()
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout

        assert '"uplink_id"' in paste("the device reports")
        assert "21.5" in paste("what it reported")
        assert '"api_key":"sk_live_' in paste("register another device").replace(" ", "")
        assert '"sessions"' in paste("who is connected")
        assert "Lab Bench Thermometer" in paste("all devices, from the command line")
        assert "revoked " in paste("throw the device out")
        assert "UNAUTHENTICATED" in paste("it tries again: 401")
        assert "auth.refused" in paste("why?")
        assert "id: " in paste("watch what happens (goes on until Ctrl-C)", seconds=1.5)

        for _ in range(3):  # somebody is impatient
            process.send_signal(signal.SIGINT)
            time.sleep(0.04)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


async def test_a_step_that_does_not_hold_ends_the_demo_with_1_and_one_line(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(story: Story) -> None:
        story.ask("GET", "/devices", expect=204)

    monkeypatch.setattr("edge.demo_steps.STEPS", (Step("It is as it is not", fails),))
    environ = {**FREE_PORTS, "GATEHOUSE_DATABASE__DSN": dsn}
    monkeypatch.setenv("GATEHOUSE_DATABASE__DSN", dsn)
    assert await demo.tell(load(Path(os.devnull), tmp_path, environ), once=True) == 1
    said = capsys.readouterr()
    assert said.err.startswith("gatehouse: the demo failed in step 1: GET /devices was answered 200")
    assert said.err.count("\n") == 1
    assert "steps held" not in said.out


def test_an_unexpected_answer_names_what_was_and_what_was_expected() -> None:
    from edge.api_client import Answer
    from edge.demo_steps import checked

    with pytest.raises(Unexpected, match="POST /x was answered 503 UNAVAILABLE later; 202 was expected"):
        checked(Answer(503, {"code": "UNAVAILABLE", "message": "later"}, 1.0), "POST", "/x", 202)
