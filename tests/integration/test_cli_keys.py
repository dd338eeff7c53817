"""The commands around keys: the authority rolls over, the sealing key is staged, rotated and dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from edge.cli import run

Gatehouse = Callable[..., Awaitable[tuple[int, Any, str]]]


@pytest.fixture
def gatehouse(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Gatehouse:
    """`await gatehouse("ca", "show")`: exit code, JSON, standard error."""
    monkeypatch.setenv("GATEHOUSE_DATABASE__DSN", dsn)
    monkeypatch.setenv("GATEHOUSE_DATA_DIR", str(tmp_path / "data"))

    async def call(*words: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(run, [*words, "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return call


async def test_a_roll_over_adds_an_authority_below_the_same_root(gatehouse: Gatehouse) -> None:
    _, before, _ = await gatehouse("ca", "show")
    code, told, _ = await gatehouse("ca", "rollover")
    assert code == 0
    _, after, _ = await gatehouse("ca", "show")
    fingerprints = [each["sha256"] for each in after["certificates"]]
    assert fingerprints[:2] == [told["active"], told["previous"]]
    assert fingerprints[1:] == [each["sha256"] for each in before["certificates"]]


async def test_a_sealing_key_is_staged_used_and_the_old_one_dropped(gatehouse: Gatehouse) -> None:
    await gatehouse("tenant", "create", "Acme")
    _, first, _ = await gatehouse("key-ring", "show")
    code, staged, _ = await gatehouse("key-ring", "stage")
    assert (code, staged["active"]) == (0, first["active"])
    code, rotated, _ = await gatehouse("key-ring", "rotate", "--key", staged["staged"])
    assert (code, rotated["active"], rotated["left"]) == (0, staged["staged"], 0)
    assert rotated["resealed"] >= 3  # the canary, the operators' issuer key, the authorities
    code, _, complaint = await gatehouse("key-ring", "drop", staged["staged"])
    assert code == 1
    assert complaint
    code, dropped, _ = await gatehouse("key-ring", "drop", first["active"])
    assert (code, dropped["key_ids"]) == (0, [staged["staged"]])
    code, token, _ = await gatehouse("token", "mint", "--tenant", "acme", "--role", "member")
    assert code == 0
    assert token["token"]
    code, _, complaint = await gatehouse("key-ring", "rotate", "--key", "nobody")
    assert code == 1
    assert "nobody" in complaint
