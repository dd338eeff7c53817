"""Pages for newcomers, word for word: their commands run in order against a server and must do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[dict[str, int]]:
    """`gatehouse serve` on the data directory that the README names; the ports that its ready line tells."""
    command = [sys.executable, "-m", "edge", "serve", "--data-dir", str(tmp_path / "gatehouse-data")]
    environment = _environment(
        tmp_path, GATEHOUSE_HTTPS__PORT="0", GATEHOUSE_MQTT__PORT="0", GATEHOUSE_COAP__PORT="0", GATEHOUSE_OPS__PORT="0"
    )
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            assert ready, (tmp_path / "log").read_text()
            yield json.loads(ready)["ready"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
            assert server.stdout.read() == ""  # the ready line is all there is
        finally:
            server.kill()


def _environment(place: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEHOUSE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": f"{place / 'bin'}:{kept['PATH']}", **more}


def _blocks(page: str) -> list[str]:
    found = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return [block for block in found if "make " not in block and ".venv/bin/" not in block]  # of a checkout


def _walk(place: Path, ports: dict[str, int], *pages: str, silent: bool = True) -> list[str]:
    """What each block of the README after its first, and then of these pages, says on standard output.

    `silent`: they say nothing on standard error.
    """
    bash = shutil.which("bash")
    if bash is None or shutil.which("curl") is None or shutil.which("openssl") is None:
        pytest.skip("bash, curl and openssl are needed")
    program = place / "bin" / "gatehouse"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m edge "$@"\n')
    program.chmod(0o755)

    start, *readme = _blocks("README.md")
    assert "gatehouse serve" in start
    blocks = [*readme, *(block for page in pages for block in _blocks(page))]
    script = "\n".join(f"{block}\necho '#### end {number}'" for number, block in enumerate(blocks))
    script = script.replace("localhost:8443", f"localhost:{ports['https']}")
    script = script.replace("-h localhost -p 8883", f"-h localhost -p {ports['mqtt']}")
    script = script.replace("coaps://localhost:5684", f"coaps://localhost:{ports['coap']}")
    script = script.replace("coap -s 60", "coap -s 1")
    done = subprocess.run(
        [bash, "-c", "set -euo pipefail\n" + script],
        cwd=place, env=_environment(place), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not silent or done.stderr == "", done.stdout
    return re.split(r"#### end \d+\n", done.stdout)


def test_a_device_over_mqtt_goes_as_its_page_says(tmp_path: Path, ports: dict[str, int]) -> None:
    if shutil.which("mosquitto_rr") is None:
        pytest.skip("mosquitto's clients are needed")
    said = _walk(tmp_path, ports, "docs/mqtt.md")[4:]

    _, provisioned, claimed, renewed, told, once, children, granted, kept, rest = said
    assert (provisioned, claimed, renewed, once, children, rest) == ("",) * 6
    for answer in ("gateway", "counter", "renewed", "child"):
        assert json.loads((tmp_path / f"{answer}.json").read_text())["status"] == "ok"
    reading, config, command = told.splitlines()
    assert json.loads(reading)["readings"][0]["value"] == 24.5
    assert json.loads(config) == {"version": 1, "config": {}}
    assert json.loads(command)["method"] == "fan.on"
    assert granted == "hall/3/alarm smoke\n"
    assert kept == "hall/4/alarm fire\n"


def test_a_device_over_coap_goes_as_its_page_says(tmp_path: Path, ports: dict[str, int]) -> None:
    if shutil.which("coap-client-openssl") is None:
        pytest.skip("libcoap's client is needed")
    said = _walk(tmp_path, ports, "docs/coap.md", silent=False)[4:]

    registered, by_hand, claimed, certified, rest = said
    assert json.loads(registered)["psk"]["identity"]
    for word in ("</telemetry>", '"method":"reboot"', '{"version":1,"config":{}}', '"config":{"interval_s":60}'):
        assert word in by_hand
    assert json.loads(claimed)["psk"]["identity"]
    assert "notAfter=" in certified
    assert rest == ""


def test_the_first_device_and_the_batch_go_as_the_pages_say(tmp_path: Path, ports: dict[str, int]) -> None:
    said = _walk(tmp_path, ports, "docs/quick-start.md", "docs/certificates.md")

    tenant, registered, reported, looked = said[:4]
    assert json.loads(tenant)["slug"] == "fleet"
    assert json.loads(registered)["status"] == "registered"
    assert reported.endswith("202\n")
    assert '"value":21.5' in looked.replace(" ", "")
    assert "sessions closed: " in looked
    assert '"UNAUTHENTICATED"' in looked
    assert "401\n" in looked
    assert "auth.refused" in looked

    template, claimed, used, rotated, revoked, timeline, events = said[4:11]
    assert (template, claimed) == ("", "")
    assert used == "202\n"
    assert rotated == "202\n202\n"
    assert '"devices":1' in revoked.replace(" ", "")
    assert revoked.endswith("401\n")
    assert "credential.revoked" in timeline
    assert '"events"' in events

    token, verified, mutual, registered, ended, enrolled = said[11:17]
    assert token == ""
    assert verified == "pump.pem: OK\n"
    assert mutual.endswith(" 202\n")
    assert '"origin":"foreign"' in registered
    assert registered.endswith(" 202\n")
    assert '"transport"' not in ended  # nobody was connected
    assert " 401\n" in ended
    assert "Serial Number" in ended
    assert enrolled.startswith("issuer=")
