"""What an operator may write, what wins, and what is said when it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import config as configuration
from edge.config import Config, ConfigError, describe, load, reference

DSN = "postgres://gate:s3cr%40t@db.example:5433/gatehouse?sslmode=require"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A current directory without a gatehouse.toml."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def loaded(home: Path, text: str | None = None, *, data_dir: Path | None = None, **environ: str) -> Config:
    path = None
    if text is not None:
        path = home / "given.toml"
        path.write_text(text)
    return load(path, data_dir, {"HOME": "/home/ada", **environ}, directory=home)


def refusal(home: Path, text: str | None = None, **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loaded(home, text, **environ)
    return caught.value


class TestDefaults:
    def test_every_default_works_and_nothing_is_left_open(self, home: Path) -> None:
        config = loaded(home, data_dir=home / "data")
        assert (config.https.port, config.mqtt.port, config.coap.port, config.ops.port) == (8443, 8883, 5684, 9464)
        assert config.https.host == config.ops.host == "127.0.0.1"
        assert config.database.dsn is None
        assert config.security.key_ring == home / "data" / "secrets" / "key-ring.json"
        assert config.telemetry.retention_days == 90

    def test_every_default_is_within_its_own_bounds(self, home: Path) -> None:
        described = describe(loaded(home, data_dir=home / "data"))
        environ = {
            key.variable: json.dumps(value) if isinstance(value, list) else str(value)
            for key in configuration.KEYS.values()
            if (value := (described[key.section] if key.section else described)[key.name]) is not None
        }
        assert describe(loaded(home, **environ)) == described

    def test_root_and_others_have_their_own_data_directory(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.geteuid", lambda: 0)
        assert loaded(home).data_dir == Path("/var/lib/gatehouse")
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        assert loaded(home).data_dir == Path("/home/ada/.local/share/gatehouse")
        assert loaded(home, XDG_DATA_HOME="/xdg").data_dir == Path("/xdg/gatehouse")
        assert loaded(home, XDG_DATA_HOME="relative").data_dir == Path("/home/ada/.local/share/gatehouse")

    def test_nodes_on_one_host_differ_and_keep_their_ids(self, home: Path) -> None:
        one, other = loaded(home, data_dir=home / "a"), loaded(home, data_dir=home / "b")
        assert one.node.id != other.node.id
        assert loaded(home, data_dir=home / "a").node.id == one.node.id

    @pytest.mark.parametrize("host", ["", "...", "Küche.example.org", "-x-", "a" * 300, "A_B.local", "\n"])
    def test_any_host_name_makes_a_node_id_that_could_be_configured(
        self, home: Path, host: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("socket.gethostname", lambda: host)
        made = loaded(home, data_dir=home / "data").node.id
        assert loaded(home, GATEHOUSE_NODE__ID=made).node.id == made


class TestPrecedence:
    def test_a_variable_beats_the_file(self, home: Path) -> None:
        assert loaded(home, "[https]\nport = 1", GATEHOUSE_HTTPS__PORT="2").https.port == 2

    def test_the_command_line_beats_all(self, home: Path) -> None:
        config = loaded(home, 'data_dir = "/file"', data_dir=Path("/line"), GATEHOUSE_DATA_DIR="/variable")
        assert config.data_dir == Path("/line")
        assert loaded(home, 'data_dir = "/file"', GATEHOUSE_DATA_DIR="/variable").data_dir == Path("/variable")

    def test_an_empty_variable_counts_as_not_set(self, home: Path) -> None:
        assert loaded(home, "[https]\nport = 1", GATEHOUSE_HTTPS__PORT="").https.port == 1
        assert loaded(home, GATEHOUSE_DATABASE__DSN="").database.dsn is None

    def test_the_file_of_the_current_directory_is_found(self, home: Path) -> None:
        (home / "gatehouse.toml").write_text("[ops]\nport = 7")
        assert loaded(home).ops.port == 7

    def test_a_variable_names_the_file(self, home: Path) -> None:
        (home / "other.toml").write_text("[ops]\nport = 8")
        assert loaded(home, GATEHOUSE_CONFIG="other.toml").ops.port == 8

    def test_relative_paths_start_where_they_were_written(self, home: Path) -> None:
        (home / "etc").mkdir()
        (home / "etc" / "g.toml").write_text('data_dir = "d"\n[security]\nkey_ring = "k.json"')
        config = load(Path("etc/g.toml"), None, {}, directory=home)
        assert (config.data_dir, config.security.key_ring) == (home / "etc" / "d", home / "etc" / "k.json")
        assert load(None, Path("d"), {}, directory=home).data_dir == home / "d"
        assert loaded(home, GATEHOUSE_DATA_DIR="d").data_dir == home / "d"


class TestVariables:
    @pytest.mark.parametrize("text", ["a.example, 10.0.0.1", '["a.example", "10.0.0.1"]', "a.example,10.0.0.1,"])
    def test_lists_are_json_or_separated_by_commas(self, home: Path, text: str) -> None:
        assert loaded(home, GATEHOUSE_HTTPS__NAMES=text).https.names == ("a.example", "10.0.0.1")

    def test_numbers_and_choices(self, home: Path) -> None:
        config = loaded(home, GATEHOUSE_SECURITY__FEED_GRACE_SECONDS="2.5", GATEHOUSE_LOGS__LEVEL="debug")
        assert (config.security.feed_grace_seconds, config.logs.level) == (2.5, "debug")

    def test_one_underscore_instead_of_two_is_pointed_out(self, home: Path) -> None:
        error = refusal(home, GATEHOUSE_HTTPS_PORT="8444")
        assert error.key == "https.port"
        assert "GATEHOUSE_HTTPS__PORT" in error.reason

    def test_what_kubernetes_injects_is_nobodys_mistake(self, home: Path) -> None:
        config = loaded(home, GATEHOUSE_HTTPS_PORT="tcp://10.0.0.1:443", GATEHOUSE_SERVICE_HOST="10.0.0.1")
        assert config.https.port == 8443

    @pytest.mark.parametrize("name", ["GATEHOUSE_HTTPS__PROT", "GATEHOUSE_HTPS__PORT", "GATEHOUSE___PORT"])
    def test_an_unknown_variable_is_refused(self, home: Path, name: str) -> None:
        assert name in refusal(home, **{name: "1"}).reason


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "key", "told"),
        [
            ("[https]\nport = 70000", "https.port", "a whole number from 0 to 65,535, not 70000"),
            ("[https]\nport = -1", "https.port", "not -1"),
            ('[https]\nport = "8443"', "https.port", "not '8443'"),
            ("[https]\nport = true", "https.port", "not True"),
            ("[https]\nport = 8443.5", "https.port", "not 8443.5"),
            ("[https]\nport = {a = 1}", "https.port", "not a table"),
            ("[https]\nprot = 1", "https.prot", "did you mean port?"),
            ("[htps]\nport = 1", "htps", "did you mean https?"),
            ("[zzz]", "zzz", "known are: coap, data_dir"),
            ("https = 8443", "https", "written [https]"),
            ('[https]\nhost = "http://x"', "https.host", "without brackets or port"),
            ('[https]\nhost = "[::1]"', "https.host", "not '[::1]'"),
            ('[https]\nhost = "a\\n"', "https.host", "not 'a\\n'"),
            ('[https]\nnames = "a"', "https.names", "a list of at most 100"),
            ('[https]\nnames = ["a b"]', "https.names", "DNS names"),
            ("[security]\nfeed_grace_seconds = nan", "security.feed_grace_seconds", "not nan"),
            ("[security]\nfeed_grace_seconds = inf", "security.feed_grace_seconds", "not inf"),
            ('[logs]\nlevel = "loud"', "logs.level", "one of debug, error, info, warning"),
            ('[node]\nid = "Ä"', "node.id", "not '\\xc4'"),
            ('[https]\nkey = "k"', "https.certificate", "is missing"),
            ('[https]\ncertificate = "c"', "https.key", "is missing"),
            ('[https]\ncertificate = "c"\nkey = "k"', "https.certificate", "No such file"),
            ('[security]\noperator_jwks = "."', "security.operator_jwks", "is a directory"),
            ('[security]\nkey_ring = "."', "security.key_ring", "is a directory"),
            ('data_dir = "given.toml"', "data_dir", "is not a directory"),
            ('data_dir = "a\\u0000b"', "data_dir", "must be a path"),
            ("[mqtt]\nport = 8443", "mqtt.port", "8443 is also https.port"),
            ('[ops]\nhost = "0.0.0.0"\nport = 8443', "ops.port", "also https.port"),
            ("[coap]\nport = 5685", "lwm2m.port", "also coap.port"),
            ("[limits]\ntls_handshakes = 10", "limits.tls_handshakes_per_address", "at most that is allowed"),
            ('[database]\ndsn_file = "none"', "database.dsn_file", "No such file"),
            ("[https", "--config", "is not TOML"),
            ("[ops]\n[ops]", "--config", "is not TOML"),
        ],
    )
    def test_a_mistake_is_named_with_what_is_allowed(self, home: Path, text: str, key: str, told: str) -> None:
        error = refusal(home, text)
        assert error.key == key
        assert told in error.reason
        assert str(error) == f"{error.key}: {error.reason}"
        assert "\n" not in str(error)

    def test_the_source_of_a_wrong_value_is_named(self, home: Path) -> None:
        assert "from GATEHOUSE_HTTPS__PORT" in refusal(home, GATEHOUSE_HTTPS__PORT="x").reason
        assert "given.toml" in refusal(home, "[https]\nport = 'x'").reason

    @pytest.mark.parametrize("raw", [b"\xff\xfe", b"#" * (2 << 20), b"a=" + b"[" * 100_000, b"a = 1\0"])
    def test_a_file_that_is_no_configuration(self, home: Path, raw: bytes) -> None:
        (home / "x.toml").write_bytes(raw)
        with pytest.raises(ConfigError, match=r"^--config: .*x\.toml"):
            load(home / "x.toml", None, {}, directory=home)

    def test_a_missing_file_is_not_the_same_as_none(self, home: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            load(home / "absent.toml", None, {}, directory=home)

    def test_port_zero_never_clashes(self, home: Path) -> None:
        names = ("HTTPS", "MQTT", "COAP", "LWM2M", "OPS")
        assert loaded(home, **{f"GATEHOUSE_{name}__PORT": "0" for name in names}).https.port == 0

    @given(text=st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
    def test_no_text_gives_anything_but_a_value_or_the_declared_error(self, text: str) -> None:
        for key in configuration.KEYS.values():
            told = ""
            try:
                load(Path("/dev/null"), None, {key.variable: text}, directory=Path("/nowhere"))
            except ConfigError as error:
                told = str(error)
            assert "\n" not in told
            assert len(told) < 500


class TestSecrets:
    def test_the_password_of_the_dsn_is_shown_nowhere(self, home: Path) -> None:
        config = loaded(home, GATEHOUSE_DATABASE__DSN=DSN)
        assert config.database.dsn is not None
        assert config.database.dsn.reveal() == DSN
        for shown in (repr(config), str(config), json.dumps(describe(config))):
            assert "s3cr" not in shown
        assert describe(config)["database"]["dsn"] == "postgres://gate:***@db.example:5433/gatehouse"

    @pytest.mark.parametrize(
        "dsn", ["mysql://a:hidden@h/d", "hidden", "postgres://u:hidden@h:port/d", "postgres://[hidden"]
    )
    def test_a_refused_dsn_is_not_repeated(self, home: Path, dsn: str) -> None:
        error = refusal(home, GATEHOUSE_DATABASE__DSN=dsn)
        assert error.key == "database.dsn"
        assert "postgres://user:password@host" in error.reason
        assert "hidden" not in str(error)

    def test_a_dsn_of_the_wrong_type_is_not_repeated(self, home: Path) -> None:
        assert "hidden" not in str(refusal(home, '[database]\ndsn = ["hidden"]'))

    def test_the_dsn_may_come_from_a_file(self, home: Path) -> None:
        (home / "dsn").write_text(DSN + "\n")
        config = loaded(home, GATEHOUSE_DATABASE__DSN_FILE="dsn")
        assert config.database.dsn is not None
        assert config.database.dsn.reveal() == DSN
        assert refusal(home, GATEHOUSE_DATABASE__DSN_FILE="dsn", GATEHOUSE_DATABASE__DSN=DSN).key == "database.dsn_file"


class TestReference:
    def test_the_page_is_current(self) -> None:
        page = Path(__file__).parents[2] / "docs" / "configuration.md"
        assert page.read_text() == reference(), "run: python -m edge.config > docs/configuration.md"

    def test_every_key_says_why(self) -> None:
        assert [key.dotted for key in configuration.KEYS.values() if len(key.description) < 20] == []

    def test_the_example_of_the_page_loads(self, home: Path) -> None:
        assert loaded(home, reference().split("```toml\n")[1].split("```")[0]).telemetry.retention_days == 30
