"""The deployment files name only what exists: keys of the configuration, files of the repository, declared volumes.

No container engine is needed; what only an engine can tell is not tested here.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge.config import KEYS, load

yaml = pytest.importorskip("yaml")

COMPOSE = Path(__file__).parents[2] / "compose"
FILES = ("compose.yaml", "cluster.yaml")
VARIABLES = {key.variable for key in KEYS.values()}


def parsed(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((COMPOSE / name).read_text())
    return document


def image_environment() -> dict[str, str]:
    return dict(re.findall(r"(GATEHOUSE_\w+)=(\S+)", (COMPOSE / "Dockerfile").read_text()))


def nodes(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [service for service in document["services"].values() if service.get("image") == "gatehouse"]


@pytest.mark.parametrize("name", FILES)
def test_every_node_gets_a_configuration_that_loads(name: str, tmp_path: Path) -> None:
    for node in nodes(parsed(name)):
        environ = image_environment() | node["environment"]
        assert set(environ) <= VARIABLES
        if "GATEHOUSE_DATABASE__DSN_FILE" in environ:
            (tmp_path / "dsn").write_text("postgres://u:p@h/d")
            environ["GATEHOUSE_DATABASE__DSN_FILE"] = str(tmp_path / "dsn")
        environ["GATEHOUSE_HTTPS__NAMES"] = ""
        config = load(None, None, environ, directory=tmp_path)
        assert config.node.id == environ["GATEHOUSE_NODE__ID"]
        assert config.https.host == "0.0.0.0"
        assert config.ops.host == "127.0.0.1"


@pytest.mark.parametrize("name", FILES)
def test_published_ports_are_those_that_a_node_listens_on(name: str, tmp_path: Path) -> None:
    config = load(None, tmp_path, image_environment(), directory=tmp_path)
    inside = {str(config.https.port), str(config.mqtt.port), f"{config.coap.port}/udp"}
    for node in nodes(parsed(name)):
        assert {port.split(":")[1] for port in node["ports"]} == inside


@pytest.mark.parametrize("name", FILES)
def test_volumes_secrets_and_files_are_declared_and_exist(name: str) -> None:
    document = parsed(name)
    for service in document["services"].values():
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(document["volumes"])
        assert set(service.get("secrets", [])) <= set(document.get("secrets", {}))
        if "build" in service:
            assert (COMPOSE / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    for node in nodes(document):
        assert any(volume.endswith(":/var/lib/gatehouse") for volume in node["volumes"])
        assert node["cap_drop"] == ["ALL"]


def test_nodes_of_the_cluster_share_the_key_ring_and_nothing_else() -> None:
    one, other = nodes(parsed("cluster.yaml"))
    assert set(one["volumes"]) & set(other["volumes"]) == {"keys:/var/lib/gatehouse-keys"}
    assert one["environment"]["GATEHOUSE_NODE__ID"] != other["environment"]["GATEHOUSE_NODE__ID"]


def test_the_image_does_not_run_as_root_and_copies_only_what_exists() -> None:
    dockerfile = (COMPOSE / "Dockerfile").read_text()
    assert "\nUSER gatehouse\n" in dockerfile
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for source in copied.split():
            assert (COMPOSE.parent / source).exists()


def test_secrets_are_made_once_and_agree(tmp_path: Path) -> None:
    shutil.copy(COMPOSE / "make-secrets.sh", tmp_path)
    for _ in range(2):
        subprocess.run(["sh", str(tmp_path / "make-secrets.sh")], check=True, capture_output=True, timeout=20)
        password = (tmp_path / "secrets" / "postgres-password").read_text()
        assert re.fullmatch(r"[0-9a-f]{64}", password)
        assert f":{password}@postgres:" in (tmp_path / "secrets" / "gatehouse-dsn").read_text()
    assert stat.S_IMODE(os.stat(tmp_path / "secrets").st_mode) == 0o700
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["make-secrets.sh", "secrets"]
