"""The checklist of normative statements is whole, and every proof that it names exists.

The numbers below were compared with lists that others made of the standards' appendices: 5.0's has 251 statements (5,
7, 175, 60 and 4 in chapters 1, 2, 3, 4 and 6), beside the four of chapter 7; all 141 of 3.1.1 are in one of them.
"""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CHECKLIST = tomllib.loads((TESTS / "mqtt_conformance.toml").read_text(encoding="utf-8"))

# How many statements each section has, by the numbering of the two standards.
V5 = {
    "1.5.4": 3, "1.5.5": 1, "1.5.7": 1, "2.1.3": 1, "2.2.1": 6, "2.2.2": 1, "3.1.0": 2, "3.1.2": 30, "3.1.3": 12,
    "3.1.4": 6, "3.2.0": 2, "3.2.2": 22, "3.3.1": 13, "3.3.2": 20, "3.3.4": 10, "3.4.2": 3, "3.5.2": 3, "3.6.1": 1,
    "3.6.2": 3, "3.7.2.1": 3, "3.8.1": 1, "3.8.3": 5, "3.8.4": 8, "3.9.2": 2, "3.9.3": 2, "3.10.1": 1, "3.10.2": 2,
    "3.10.4": 6, "3.11.2": 2, "3.11.3": 2, "3.12.4": 1, "3.14.0": 1, "3.14.1": 1, "3.14.2": 4, "3.14.4": 3,
    "3.15.1": 1, "3.15.2": 3, "4.1.0": 2, "4.2": 1, "4.3.1": 1, "4.3.2": 5, "4.3.3": 13, "4.4.0": 2, "4.5.0": 2,
    "4.6.0": 6, "4.7.0": 1, "4.7.1": 2, "4.7.2": 1, "4.7.3": 4, "4.8.2": 6, "4.9.0": 3, "4.12.0": 7, "4.12.1": 2,
    "4.13.1": 1, "4.13.2": 1, "6.0.0": 4, "7.0.0": 2, "7.1.1": 1, "7.1.2": 1,
}  # fmt: skip
V311 = {
    "1.5.3": 3, "2.2.2": 2, "2.3.1": 7, "3.1.0": 2, "3.1.2": 24, "3.1.3": 11, "3.1.4": 5, "3.2.0": 1, "3.2.2": 6,
    "3.3.1": 12, "3.3.2": 3, "3.3.4": 1, "3.3.5": 2, "3.6.1": 1, "3.8.1": 1, "3.8.3": 4, "3.8.4": 6, "3.9.3": 2,
    "3.10.1": 1, "3.10.3": 2, "3.10.4": 6, "3.12.4": 1, "3.14.1": 1, "3.14.4": 3, "4.1.0": 2, "4.3.1": 1, "4.3.2": 2,
    "4.3.3": 2, "4.4.0": 1, "4.5.0": 2, "4.6.0": 6, "4.7.1": 3, "4.7.2": 1, "4.7.3": 4, "4.8.0": 2, "6.0.0": 4,
    "7.0.0": 2, "7.1.1": 1, "7.1.2": 1,
}  # fmt: skip
MISSING_IN_THE_STANDARD = {"v5": {"2.2.1-1"}, "v311": set[str]()}


@pytest.mark.parametrize(("version", "sections"), [("v5", V5), ("v311", V311)])
def test_every_statement_is_listed_once(version: str, sections: dict[str, int]) -> None:
    expected = {f"{section}-{number}" for section, count in sections.items() for number in range(1, count + 1)}
    expected -= MISSING_IN_THE_STANDARD[version]
    listed = CHECKLIST[version]
    clients = listed["client"]
    assert len(clients) == len(set(clients))
    assert set(clients) | set(listed) - {"client"} == expected
    assert not set(clients) & set(listed)


@pytest.mark.parametrize("version", ["v5", "v311"])
def test_every_duty_names_a_proof_that_exists(version: str) -> None:
    proofs = {number: row for number, row in CHECKLIST[version].items() if number != "client"}
    assert missing(proofs, defined()) == []


def test_what_is_refused_has_a_reason_and_a_proof() -> None:
    rows = CHECKLIST["refused"]
    assert missing(rows, defined()) == []
    assert all(not proof.startswith("unsupported") for _, *proofs in rows.values() for proof in proofs)


@pytest.mark.parametrize(
    "row",
    [
        ["a duty"],
        ["", "wire::test_a_byte_order_mark_is_kept"],
        ["a duty", "unsupported"],
        ["a duty", "shell"],
        ["a duty", "wire::test_that_is_not_there"],
        ["a duty", "wire::test_a_byte_order_mark_is_kept", "integration/wire::test_a_byte_order_mark_is_kept"],
        ["a duty", "test_a_byte_order_mark_is_kept"],
        ["a duty", "wire::scanned"],
    ],
)
def test_a_row_without_a_proof_is_found(row: list[str]) -> None:
    assert missing({"1.2.3-4": row}, defined()) == ["1.2.3-4"]


def test_the_server_opens_no_connections_to_others() -> None:
    """[MQTT-7.0.0-1] asks a server that does so to be a client as well. Nothing in the MQTT adapter can."""
    opening = {"create_connection", "open_connection", "create_datagram_endpoint", "sock_connect", "connect_ex"}
    for path in (TESTS.parent / "adapters" / "mqtt").glob("*.py"):
        called = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert not called & opening, path


def missing(rows: dict[str, list[str]], tests: set[str]) -> list[str]:
    """The rows that say nothing, name no test, or name one that does not exist."""
    wrong = []
    for name, (duty, *named) in rows.items():
        proofs = named[1:] if named[:1] == ["unsupported"] else named
        if not duty or not proofs or any(proof not in tests for proof in proofs):
            wrong.append(name)
    return wrong


@cache
def defined() -> set[str]:
    """Every test of MQTT as the checklist names it: `file::test`, `integration/file::test`.

    Functions at the top of a file, and the names that a state machine's test case is bound to. One that is always
    skipped, or expected to fail, proves nothing and is not among them.
    """
    found = set()
    for folder, prefix in (("unit", ""), ("integration", "integration/")):
        for path in (TESTS / folder).glob("test_mqtt_*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    if any(mark in ast.unparse(each) for each in node.decorator_list for mark in ("skip", "xfail")):
                        continue
                    names = [node.name]
                elif isinstance(node, ast.Assign):
                    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                else:
                    continue
                stem = path.stem.removeprefix("test_mqtt_")
                found.update(f"{prefix}{stem}::{name}" for name in names if name.lower().startswith("test"))
    return found
