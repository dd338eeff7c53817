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
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge import demo
from edge.config import load
from edge.demo_pastes import GATEWAY_FILE, chapters
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
            else:
                assert process.stderr is not None
                pytest.fail(f"{''.join(lines[-5:])}{process.stderr.read()}")
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


@dataclass(frozen=True, slots=True)
class Shell:
    """Somebody at a terminal, with what a serving demo has printed."""

    place: Path
    exports: list[str]
    printed: dict[str, str]

    def paste(self, what: str, *, fails: bool = False) -> str:
        """What one of the printed commands says, on both streams if it is to fail."""
        done = subprocess.run(
            self._command(what),
            capture_output=True, text=True, timeout=60, env=_environment(), cwd=self.place, check=False,
        )  # fmt: skip
        if fails:
            return done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout

    def says(self, what: str, word: str) -> bool:
        """Whether one of the printed commands says a word; one that goes on is ended then."""
        with subprocess.Popen(
            self._command(what),
            stdout=subprocess.PIPE, text=True, env=_environment(), cwd=self.place, start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                return any(word in line for line in process.stdout)
            finally:
                os.killpg(process.pid, signal.SIGKILL)

    def _command(self, what: str) -> list[str]:
        command = re.sub(r"^\S*gatehouse(?= device)", f"{sys.executable} -m edge", self.printed[what])
        bash = shutil.which("bash")
        assert bash is not None
        return [bash, "-c", "\n".join([*self.exports, command])]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    place = tmp_path_factory.mktemp("demo")
    with _serving_demo(place) as (_, said):
        pasted = dict(re.findall(r"^# ([^\n]+)\n(\S+ .+)$", said, re.MULTILINE))
        commands = [paste for chapter in chapters(Path("d"), "gatehouse") for paste in chapter.pastes]
        assert len(pasted) == len(commands), said
        yield Shell(place, [line for line in said.splitlines() if line.startswith("export ")], pasted)


def _needs(*programs: str) -> None:
    missing = [name for name in ("bash", *programs) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is needed")


def test_the_commands_with_curl_work_when_pasted(shell: Shell) -> None:
    _needs("curl")
    assert '"uplink_id"' in shell.paste("the device reports")
    assert "21.5" in shell.paste("what it reported")
    assert '"api_key":"sk_live_' in shell.paste("register another device").replace(" ", "")
    assert '"sessions"' in shell.paste("who is connected")
    assert "Lab Bench Thermometer" in shell.paste("all devices, from the command line")
    assert "revoked " in shell.paste("throw the device out")
    assert "UNAUTHENTICATED" in shell.paste("it tries again: 401")
    assert "auth.refused" in shell.paste("why?")
    assert shell.says("watch what happens (goes on until Ctrl-C)", "id: ")


def test_the_commands_with_mosquittos_clients_work_when_pasted(shell: Shell) -> None:
    _needs("curl", "mosquitto_pub", "mosquitto_sub")
    assert (shell.place / "gatehouse-data" / GATEWAY_FILE).stat().st_mode & 0o777 == 0o600
    assert shell.paste("the gateway reports; it comes back when that is stored") == ""
    assert '"value":24.5' in shell.paste("what the gateway reported")
    assert '"status":"queued"' in shell.paste("a command for it, waiting")
    assert '"method":"fan.on"' in shell.paste("the gateway fetches it")
    assert "denied" in shell.paste("a foreign topic: refused", fails=True)
    assert "revoked " in shell.paste("throw the gateway out")
    assert "not authorised" in shell.paste("it tries again: not authorised", fails=True)


def test_the_commands_with_libcoaps_client_work_when_pasted(shell: Shell) -> None:
    _needs("curl", "coap-client-openssl")
    assert "2.04" in shell.paste("the meter reports", fails=True)  # what it says about its packets is not its result
    assert '"value":0.42' in shell.paste("what the meter reported")
    assert '{"version":1,"config":{}}' in shell.paste("its configuration")
    assert "</telemetry>" in shell.paste("what else it may ask")
    assert "revoked " in shell.paste("throw the meter out")
    assert "bad record mac" in shell.paste("it tries again: no handshake", fails=True)


def test_ctrl_c_ends_it_also_for_the_impatient(tmp_path: Path) -> None:
    with _serving_demo(tmp_path) as (process, _):
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.04)
        assert process.stderr is not None
        assert (process.wait(timeout=30), process.stderr.read()) == (0, "")


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
