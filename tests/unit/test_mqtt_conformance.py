"""The checklist of normative statements is whole, and every proof that it names exists."""

from __future__ import annotations

import ast
import tomllib
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
    tests = {
        f"{path.stem.removeprefix('test_mqtt_')}::{name}"
        for path in (TESTS / "unit").glob("test_mqtt_*.py")
        for name in defined(path)
    }
    for number, (duty, *proofs) in CHECKLIST[version].items():
        if number == "client":
            continue
        assert duty
        assert proofs, number
        for proof in proofs:
            assert proof in tests or proof in ("shell", "unsupported"), f"{number}: {proof}"


def defined(path: Path) -> set[str]:
    """The tests at the top of a file, and the names that a state machine's test case is bound to."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in names if name.lower().startswith("test")}
