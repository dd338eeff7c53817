"""The configuration: parsed once at the start, complete, frozen; nobody below `edge` reads a file or the environment.

Theory. `load` merges, from weak to strong: the defaults of config_sections.py, `gatehouse.toml`, variables
`GATEHOUSE_<SECTION>__<KEY>` (`GATEHOUSE_DATA_DIR` for the one key without a section) and `--data-dir`. What comes out
has no gaps: paths are absolute, the node has an id, the key ring has a place. A mistake is a `ConfigError` before any
socket opens, and an unknown name is a mistake: a misspelt limit must not silently keep its default.

- The file is `--config F`, else `$GATEHOUSE_CONFIG`, else `gatehouse.toml` in the current directory, else
  `/etc/gatehouse/gatehouse.toml`; without any of them the defaults hold.
- A relative path in the file starts at the file's directory; in a variable or on the command line, at the current one.
- `data_dir` is by default `/var/lib/gatehouse` for root and `${XDG_DATA_HOME:-~/.local/share}/gatehouse` for others.
- `node.id` is by default the host name and six characters of a hash of the data directory, so that two nodes on one
  host differ and one node keeps its id through restarts.

Secrets: `database.dsn` is a `Secret`; no repr, error or `describe` shows its password.
`docs/configuration.md` is `python -m edge.config`; a test keeps the two equal.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import pwd
import re
import socket
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from edge.config_listeners import Coap, Https, Lwm2m, Mqtt, Ops
from edge.config_reference import reference
from edge.config_sections import KEYS, SECTIONS, Config
from edge.config_values import ConfigError, Key, Origin, Source, parse_value, refused, unknown
from registry.secrets import Secret

__all__ = ["KEYS", "Coap", "Config", "ConfigError", "Https", "Mqtt", "Ops", "describe", "load", "reference"]

PREFIX = "GATEHOUSE_"
SYSTEM_FILE = Path("/etc/gatehouse/gatehouse.toml")
MAX_FILE_BYTES = 1 << 20
"""A configuration larger than this is some other file given by mistake."""

_USUAL_HOSTS = {"127.0.0.1", "::1", "0.0.0.0", "::", "localhost"}  # noqa: S104 - compared with, not listened on

Given = dict[tuple[str, str], tuple[object, Origin]]
"""Values that somebody gave, by section and name, each with where it came from."""


def load(
    config_path: Path | None, data_dir: Path | None, environ: Mapping[str, str], *, directory: Path | None = None
) -> Config:
    """The configuration of this process. Raises `ConfigError` and nothing else.

    `config_path` and `data_dir` are the command line's; `environ` is the process environment; `directory` is where
    relative paths of both start (the current one). Reads files, opens no socket, creates nothing.
    """
    base = (directory or Path.cwd()).absolute()
    given: Given = {}
    beside = base / "gatehouse.toml"
    named = _named_file(config_path, environ, base)
    found = named or next((path for path in (beside, SYSTEM_FILE) if path.is_file()), None)
    if found is not None:
        given |= _from_file(found, unasked=named is None and found == beside)
    given |= _from_environment(environ, base)
    if data_dir is not None:
        _give(given, KEYS["", "data_dir"], str(data_dir), Origin(Source.COMMAND_LINE, "--data-dir", base))

    values = {place: value for place, (value, _) in given.items()}
    values["", "data_dir"] = home = _data_dir(values.get(("", "data_dir")), environ)
    values.setdefault(("security", "key_ring"), home / "secrets" / "key-ring.json")
    values.setdefault(("node", "id"), _node_id(socket.gethostname(), home))
    _take_dsn_from_file(values, given)
    config = _build(values)
    _check(config, given)
    return config


def describe(config: Config) -> dict[str, Any]:
    """The configuration as JSON types, for `gatehouse check-config`; of a DSN user, host and database are shown."""
    described: dict[str, Any] = {"data_dir": str(config.data_dir)}
    for name in SECTIONS:
        section = getattr(config, name)
        described[name] = {key.name: _plain(getattr(section, key.name)) for key in KEYS.values() if key.section == name}
    return described


def _named_file(config_path: Path | None, environ: Mapping[str, str], base: Path) -> Path | None:
    if config_path is not None:
        return base / config_path
    if environ.get("GATEHOUSE_CONFIG"):
        return base / environ["GATEHOUSE_CONFIG"]
    return None


def _check_trusted(path: Path, file: IO[bytes]) -> None:
    """Whoever may write into the directory in which root happens to stand does not configure root's node."""
    status = os.fstat(file.fileno())
    if os.geteuid() == 0 and (status.st_uid != 0 or status.st_mode & 0o022):
        who = f"belongs to user {status.st_uid}" if status.st_uid else "may be written by others"
        raise ConfigError(
            "--config", f"{path} {who}, so root does not read it unasked; name it with --config to use it"
        )


def _from_file(path: Path, *, unasked: bool) -> Given:
    try:
        with path.open("rb") as file:
            if unasked:
                _check_trusted(path, file)
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError("--config", f"cannot read {path}: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError("--config", f"{path} is larger than {MAX_FILE_BYTES:,} bytes, so it is no configuration")
    try:
        document = tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ConfigError("--config", f"{path} is not UTF-8 at byte {error.start:,}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        # The parser quotes names of keys and single characters, never a value: a secret stays out of the message.
        raise ConfigError("--config", f"{path} is not TOML: {str(error) or 'nested too deeply'}") from None

    origin = Origin(Source.FILE, str(path), path.parent)
    given: Given = {}
    for name, value in document.items():
        if ("", name) in KEYS:
            _give(given, KEYS["", name], value, origin)
            continue
        if name not in SECTIONS:
            raise unknown(name, "section", (*SECTIONS, "data_dir"), origin.name)
        if not isinstance(value, dict):
            raise ConfigError(name, f"is a section, written [{name}], not a value (from {origin.name})")
        for inner, inner_value in value.items():
            _give(given, _known(name, inner, origin.name), inner_value, origin)
    return given


def _from_environment(environ: Mapping[str, str], base: Path) -> Given:
    given: Given = {}
    for variable in sorted(name for name in environ if name.startswith(PREFIX)):
        place = _place(variable, environ[variable])
        if place is None:
            continue
        key = _known(*place, variable)
        if environ[variable]:  # `DSN=${DSN:-}` in a compose file means: not set
            _give(given, key, environ[variable], Origin(Source.ENVIRONMENT, variable, base))
    return given


def _place(variable: str, value: str) -> tuple[str, str] | None:
    """The section and key that a variable names, or None for one that is not a configuration key at all."""
    section, separator, name = variable.removeprefix(PREFIX).lower().partition("__")
    if separator:
        if section not in SECTIONS:
            raise unknown(section, "section", SECTIONS, variable)
        return section, name
    if ("", section) in KEYS:
        return "", section
    # One underscore instead of two is the likely slip. Kubernetes injects GATEHOUSE_HTTPS_PORT=tcp://… for a service of
    # that name, which is nobody's mistake.
    slip = next((key for key in KEYS.values() if key.section and section == f"{key.section}_{key.name}"), None)
    if slip is not None and not re.match(r"(tcp|udp|sctp)://", value):
        raise ConfigError(slip.dotted, f"{variable} is no variable of ours; did you mean {slip.variable}?")
    return None


def _known(section: str, name: str, origin: str) -> Key:
    key = KEYS.get((section, name))
    if key is None:
        allowed = [known for owner, known in KEYS if owner == section]
        raise unknown(f"{section}.{name}", "key", allowed, origin)
    return key


def _give(given: Given, key: Key, raw: object, origin: Origin) -> None:
    given[key.section, key.name] = parse_value(key, raw, origin), origin


def _data_dir(given: object, environ: Mapping[str, str]) -> Path:
    if isinstance(given, Path):
        return given
    if os.geteuid() == 0:
        return Path("/var/lib/gatehouse")
    # The XDG base directory specification: a relative value is invalid and ignored.
    if environ.get("XDG_DATA_HOME", "").startswith("/"):
        return Path(environ["XDG_DATA_HOME"]) / "gatehouse"
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            raise ConfigError("data_dir", "has no default for a user without a home; set GATEHOUSE_DATA_DIR") from None
    return Path(home) / ".local" / "share" / "gatehouse"


def _node_id(host_name: str, data_dir: Path) -> str:
    safe = re.sub(r"[^a-z0-9]+", "-", host_name.split(".")[0].lower()).strip("-")[:48] or "node"
    return f"{safe}-{hashlib.sha256(os.fsencode(os.path.realpath(data_dir))).hexdigest()[:6]}"


def _take_dsn_from_file(values: dict[tuple[str, str], object], given: Given) -> None:
    path = values.get(("database", "dsn_file"))
    if not isinstance(path, Path):
        return
    if values.get(("database", "dsn")) is not None:
        raise ConfigError("database.dsn_file", "is given beside database.dsn; only one of them is allowed")
    _check_readable("database.dsn_file", path)
    try:
        text = path.read_bytes()[:4096].decode().strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError("database.dsn_file", f"{path} must hold one line of UTF-8 text") from None
    origin = Origin(Source.FILE, str(path), path.parent)
    values["database", "dsn"] = parse_value(KEYS["database", "dsn"], text, origin)
    given["database", "dsn"] = values["database", "dsn"], origin


def _build(values: Mapping[tuple[str, str], object]) -> Config:
    def of(section: str) -> dict[str, Any]:
        return {name: value for (owner, name), value in values.items() if owner == section}

    sections: dict[str, Any] = {name: structure(**of(name)) for name, structure in SECTIONS.items()}
    return Config(**of(""), **sections)


def _check(config: Config, given: Given) -> None:
    """What single values cannot tell: files that must be there, and keys that must agree."""
    if os.path.exists(config.data_dir) and not os.path.isdir(config.data_dir):
        raise ConfigError("data_dir", f"{config.data_dir} is not a directory")
    if config.database.dsn is not None and not _usable_dsn(config.database.dsn.reveal()):
        raise refused(KEYS["database", "dsn"], None, given["database", "dsn"][1])
    if config.https.certificate is not None and config.https.key is None:
        raise ConfigError("https.key", "is missing: https.certificate is given and needs its private key")
    if config.https.key is not None and config.https.certificate is None:
        raise ConfigError("https.certificate", "is missing: https.key is given and needs its certificate")
    for dotted, path in (
        ("https.certificate", config.https.certificate),
        ("https.key", config.https.key),
        ("security.operator_jwks", config.security.operator_jwks),
    ):
        if path is not None:
            _check_readable(dotted, path)
    if os.path.exists(config.security.key_ring):
        _check_readable("security.key_ring", config.security.key_ring)
    _check_files(config)
    _check_ports(config)
    _check_at_most(config, "tls_handshakes_per_address", "tls_handshakes")
    _check_at_most(config, "uplink_payload_bytes", "body_bytes")
    _check_at_most(config, "uplink_payload_bytes", "uplink_queue_bytes")
    _check_at_most(config, "sse_streams_per_tenant", "sse_streams")


def _check_files(config: Config) -> None:
    """What the files hold, and what a certificate can be for: nothing to read with the defaults."""
    certificate, key, keys = config.https.certificate, config.https.key, config.security.operator_jwks
    hosts = {config.https.host, config.mqtt.host, config.coap.host}
    if certificate is None and keys is None and not config.https.names and hosts <= _USUAL_HOSTS:
        return
    from edge.config_files import check_operator_keys, check_server_certificate, check_server_names

    if certificate is None or key is None:
        check_server_names(config)
    else:
        check_server_certificate(certificate, key)
    if keys is not None:
        check_operator_keys(keys)


def _check_readable(dotted: str, path: Path) -> None:
    if os.path.isdir(path):
        raise ConfigError(dotted, f"{path} is a directory; a file is needed")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(dotted, f"cannot read {path}: {error.strerror}") from None


def _check_ports(config: Config) -> None:
    """Two listeners of one kind cannot share an address; 0 never clashes. TCP and UDP do not meet."""
    streams: list[tuple[str, Https | Mqtt | Ops]] = [
        ("https", config.https),
        ("mqtt", config.mqtt),
        ("ops", config.ops),
    ]
    datagrams: list[tuple[str, Coap | Lwm2m]] = [("coap", config.coap), ("lwm2m", config.lwm2m)]
    for listeners in (streams, datagrams):
        taken: dict[int, tuple[str, str]] = {}
        for name, section in listeners:
            before = taken.setdefault(section.port, (name, section.host))
            if section.port and before[0] != name and _overlap(before[1], section.host):
                raise ConfigError(f"{name}.port", f"{section.port} is also {before[0]}.port; each needs its own (or 0)")


def _overlap(one: str, other: str) -> bool:
    def everywhere(host: str) -> bool:
        try:
            return ipaddress.ip_address(host).is_unspecified
        except ValueError:
            return False

    return one == other or everywhere(one) or everywhere(other)


def _check_at_most(config: Config, small: str, large: str) -> None:
    less, more = getattr(config.limits, small), getattr(config.limits, large)
    if less > more:
        raise ConfigError(
            f"limits.{small}", f"{less:,} is more than limits.{large} ({more:,}); at most that is allowed"
        )


def _usable_dsn(dsn: str) -> bool:
    try:
        parts = urlsplit(dsn)
        return parts.scheme in ("postgres", "postgresql") and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _plain(value: object) -> object:
    match value:
        case Secret():
            return _masked_dsn(value.reveal())
        case Path():
            return str(value)
        case tuple():
            return list(value)
        case _:
            return value


def _masked_dsn(dsn: str | bytes) -> str:
    """User, host and database of a DSN. The query is dropped as a whole: libpq allows a password there, too."""
    try:
        parts = urlsplit(dsn if isinstance(dsn, str) else dsn.decode())
        user = unquote(parts.username or "")
        place = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "***"
    return f"{parts.scheme}://{user + ':***@' if user else ''}{place}{parts.path}"


if __name__ == "__main__":
    sys.stdout.write(reference())
