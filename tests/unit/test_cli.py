"""The command line without a database: options, exit codes, errors on one line, text that cannot harm a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest

from edge.cli import Invocation, UsageProblem, demo_invocation, parse_duration, run
from edge.terminal import Column, cell, plain, show_table


@pytest.fixture(autouse=True)
def _quiet_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration of this machine takes part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GATEHOUSE_CONFIG", raising=False)
    monkeypatch.delenv("GATEHOUSE_DATA_DIR", raising=False)


def test_check_config_prints_a_configuration_file_that_says_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["check-config", "--data-dir", "here"]) == 0
    first = capsys.readouterr().out
    assert tomllib.loads(first)["data_dir"] == str(tmp_path / "here")

    (tmp_path / "again.toml").write_text(first)
    assert run(["check-config", "--config", "again.toml"]) == 0
    assert capsys.readouterr().out == first


def test_check_config_masks_the_password(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEHOUSE_DATABASE__DSN", "postgres://me:hunter2@db.example/gatehouse")
    for words in (["check-config"], ["check-config", "--json"]):
        assert run(words) == 0
        said = capsys.readouterr()
        assert "hunter2" not in said.out + said.err
        assert "db.example" in said.out


def test_a_bad_configuration_ends_with_2_and_one_line_naming_key_and_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEHOUSE_HTTPS__PORT", "eighty")
    for words in (["check-config"], ["serve"], ["demo", "--once"], ["tenant", "list"], ["ca", "show"]):
        assert run(words) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("gatehouse: https.port: must be ")
        assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "--data-dir", "one", "check-config"],
        ["--json", "check-config", "--data-dir", "one"],
        ["check-config", "--data-dir", "one", "--json"],
        ["--data-dir", "two", "check-config", "--json", "--data-dir", "one"],
    ],
)
def test_the_options_of_every_command_stand_before_or_after_it(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["data_dir"] == str(tmp_path / "one")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_group_takes_them_too(place: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["key-ring", "show"]
    words[place:place] = ["--data-dir", "there", "--json"]
    assert run(words) == 1
    missing = tmp_path / "there" / "secrets" / "key-ring.json"
    assert capsys.readouterr().err == f"gatehouse: {missing} does not exist yet; the first start makes it\n"


def test_key_ring_show_names_ids_and_no_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from registry.sealing import KeyRing, save

    ring = KeyRing.generate("k1").with_new_active("k2")
    save(ring, tmp_path / "secrets" / "key-ring.json")
    assert run(["key-ring", "show", "--data-dir", str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    shown = json.loads(out)
    assert (shown["active"], shown["key_ids"]) == ("k2", ["k1", "k2"])
    for key in json.loads(ring.to_json().reveal())["keys"].values():
        assert key not in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["token", "mint", "--role", "member"], "--tenant"),
        (["device", "revoke"], "DEVICE_ID"),
        (["tenant", "create", "A", "--slugg", "b"], "--slugg"),
        (["nonsense"], "nonsense"),
        (["device", "list", "--limit", "0"], "--limit"),
        (["token", "mint", "--tenant", "t", "--role", "member", "--ttl", "5 minutes"], "--ttl: '5 minutes'"),
        (["token", "mint", "--tenant", "t", "--role", "boss"], "platform_admin, tenant_admin, member"),
        (["token", "mint", "--tenant", "t", "--role", "member", "--permission", "root"], "devices:read"),
        (["device", "list", "--status", "asleep"], "--status: unknown status 'asleep'; known are: pending"),
        (["device", "list", "--gateway-id", "g"], "--gateway-id: 'g' is no id"),
        (["device", "show", "x"], "DEVICE_ID: 'x' is no id"),
        (
            ["device", "revoke", "00000000-0000-0000-0000-000000000000", "--credential", "y"],
            "--credential: 'y' is no id",
        ),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert named in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("1h", 3600), ("7d", 604_800), ("999999999d", 999_999_999 * 86_400)],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration("--ttl", text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1.5h", "1h30m", "1w", "1 h", "１h", "1h\n", "9" * 10 + "s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageProblem, match="a number and s, m, h or d is expected"):
        parse_duration("--ttl", text)


def test_the_demo_stays_away_from_production_defaults() -> None:
    here = Invocation(Path("/dev/null"), Path("gatehouse-data"))
    assert demo_invocation(Invocation(), {}) == here
    assert demo_invocation(Invocation(data_dir=Path("d")), {}).data_dir == Path("d")
    assert demo_invocation(Invocation(), {"GATEHOUSE_DATA_DIR": "e"}).data_dir is None  # the variable says it
    chosen = Invocation(config=Path("f.toml"))
    assert demo_invocation(chosen, {}) == chosen
    assert demo_invocation(Invocation(), {"GATEHOUSE_CONFIG": "g"}).config is None


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[2J\x1b[31mred", "\\x1b[2J\\x1b[31mred"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x9b31m", "\\x9b31m"),
        ("abc\u202egnp.exe", "abc\\u202egnp.exe"),
        ("Kühlraum 7 – ok", "Kühlraum 7 – ok"),
    ],
)
def test_text_of_others_cannot_move_the_cursor(hostile: str, shown: str) -> None:
    assert plain(hostile) == shown


def test_a_table_takes_markup_for_text_and_keeps_rows_on_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[bold red]x[/] :smile: " + "long " * 100
    show_table((Column("ID", whole=True), Column("NAME")), [("1", name), ("2", "\x1b[31m\n")])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "NAME"]
    assert name.strip() in first
    assert "\\x1b[31m\\n" in second


def test_cells() -> None:
    assert [cell(nothing) for nothing in (None, "", [], {})] == ["-"] * 4
    assert cell(True) == "yes"
    assert cell(["a", "b"]) == "a, b"
    assert cell({"k": "v", "n": 1}) == "k=v, n=1"


def test_help_does_not_load_the_server() -> None:
    program = (
        "import sys; from edge.cli import run; code = run(['--help']);"
        "heavy = {'asyncpg', 'cryptography', 'litestar', 'uvloop', 'rich.console'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "check-config" in done.stdout


def test_an_interrupt_ends_quietly_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edge.commands.list_tenants", interrupted)
    assert run(["tenant", "list", "--data-dir", "d"]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
