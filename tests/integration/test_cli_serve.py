"""`gatehouse serve` as a process, and commands beside it: one ready line, clear refusals, a revocation across both."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge.api_client import ApiClient

ROOT = Path(__file__).resolve().parents[2]
GATEHOUSE = (sys.executable, "-m", "edge")


@dataclass(frozen=True)
class Node:
    """A running server with the embedded database."""

    data_dir: Path
    ports: dict[str, int]
    process: subprocess.Popen[str]

    def client(self) -> ApiClient:
        return ApiClient("localhost", self.ports["https"], self.data_dir / "ca-chain.pem")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return _run(*words, "--data-dir", str(self.data_dir))

    def json(self, *words: str) -> Any:
        done = self.command(*words, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One node for all tests of this file; it must drain and exit with 0 in the end."""
    place = tmp_path_factory.mktemp("node")
    with (
        (place / "log").open("w") as log,
        subprocess.Popen(
            [*GATEHOUSE, "serve", "--data-dir", str(place)],
            env=_environment(), stdout=subprocess.PIPE, stderr=log, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready, (place / "log").read_text()
            yield Node(place, json.loads(ready)["ready"], process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEHOUSE_")}
    ports = {
        "GATEHOUSE_HTTPS__PORT": "0",
        "GATEHOUSE_MQTT__PORT": "0",
        "GATEHOUSE_COAP__PORT": "0",
        "GATEHOUSE_OPS__PORT": "0",
    }
    return {**kept, "PYTHONPATH": str(ROOT), **ports, **more}


def _run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GATEHOUSE, *words], env=_environment(**more), capture_output=True, text=True, timeout=60, check=False
    )


def test_the_ready_line_names_ports_that_listen_and_the_log_is_json(node: Node) -> None:
    assert set(node.ports) == {"https", "mqtt", "coap", "ops"}
    for name, port in node.ports.items():
        if name != "coap":
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    for line in (node.data_dir / "log").read_text().splitlines():
        assert {"ts", "level", "event"} <= json.loads(line).keys()


def test_a_device_revoked_from_the_command_line_loses_its_open_connection(node: Node) -> None:
    node.json("tenant", "create", "Acme")
    operator = node.command("token", "mint", "--tenant", "acme", "--role", "tenant_admin").stdout.strip()
    with node.client() as admin, node.client() as device:
        made = admin.post("/devices", {"name": "Pump", "hardware_id": "P-1"}, bearer=operator).body
        assert device.post("/telemetry", {"rpm": 900}, bearer=made["api_key"]).status == 202

        receipt = node.json("device", "revoke", made["device_id"])
        assert (len(receipt["sessions"]), receipt["remaining"]) == (1, 0)
        assert receipt["sessions"][0]["transport"] == "https"
        assert receipt["sessions"][0]["closed_after_ms"] < 2000
        assert device.closed_by_server(0.1) is not None  # it was closed before the receipt was printed
        assert device.post("/telemetry", {"rpm": 901}, bearer=made["api_key"]).status == 401

        timeline = admin.get(f"/devices/{made['device_id']}/timeline", bearer=operator).body["events"]
        revoked = next(event for event in timeline if event["kind"] == "credential.revoked")
        assert revoked["actor"].startswith("operator:cli:")


def test_the_list_of_the_command_line_is_that_of_the_api(node: Node) -> None:
    node.json("tenant", "create", "Listed")
    operator = node.command("token", "mint", "--tenant", "listed", "--role", "tenant_admin").stdout.strip()
    with node.client() as admin:
        for number in range(3):
            device = {"name": f"D{number}", "hardware_id": f"L-{number}", "tags": {"n": str(number)}}
            assert admin.post("/devices", device, bearer=operator).status == 201
        for filters in ("", "?tag=n%3D1", "?q=L-2", "?status=registered"):
            wanted = filters.removeprefix("?").replace("%3D", "=")
            words = [f"--{wanted.split('=', 1)[0]}", wanted.split("=", 1)[1]] if wanted else []
            listed = node.json("device", "list", "--tenant", "listed", *words)["devices"]
            assert [d["device_id"] for d in listed] == [
                d["device_id"] for d in admin.get(f"/devices{filters}", bearer=operator).body["devices"]
            ]
            assert listed == admin.get(f"/devices{filters}", bearer=operator).body["devices"]
        shown = node.json("device", "show", listed[0]["device_id"])
        path = f"/devices/{listed[0]['device_id']}"
        credentials = admin.get(f"{path}/credentials", bearer=operator).body["credentials"]
        assert shown.pop("credentials") == credentials
        assert shown == admin.get(path, bearer=operator).body


def test_a_second_server_on_the_same_directory_is_told_who_has_it(node: Node) -> None:
    said = _run("serve", "--data-dir", str(node.data_dir))
    assert (said.returncode, said.stdout) == (1, "")
    last = said.stderr.splitlines()[-1]
    assert last.startswith(f"gatehouse: the data directory {node.data_dir} is in use by process {node.process.pid}")
    assert "Traceback" not in said.stderr


def test_a_taken_port_is_one_line_and_nothing_is_left_running(node: Node, tmp_path: Path) -> None:
    said = _run("serve", "--data-dir", str(tmp_path), GATEHOUSE_HTTPS__PORT=str(node.ports["https"]))
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.splitlines()[-1].startswith("gatehouse: cannot listen")
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "postgres" / "postmaster.pid").exists()


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for words in (("serve",), ("demo", "--once"), ("tenant", "list")):
        said = _run(*words, "--data-dir", str(tmp_path / "file" / "below"))
        assert (said.returncode, said.stdout.count("Serving")) == (1, 0)
        assert said.stderr.splitlines()[-1].startswith("gatehouse: ")
        assert "Traceback" not in said.stderr
