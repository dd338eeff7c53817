"""The configuration as a value, `Config`: its sections, and the table of all keys.

Theory. A value's name, type, bounds, default and reason stand in one place, its field; `docs/configuration.md` is made
of them. The listeners' sections are in config_listeners.py, `[limits]` is in config_limits.py, the others are here.
Nothing here reads anything (config.py does).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge.config_limits import Limits
from edge.config_listeners import Coap, Https, Lwm2m, Mqtt, Ops
from edge.config_values import Key, Seconds, Section, keys_of
from registry.secrets import Secret


class Database(Section, frozen=True, kw_only=True):
    """Where everything is stored. Without `dsn` Gatehouse runs its own PostgreSQL inside the data directory."""

    dsn: Annotated[
        Secret[str] | None,
        Meta(
            description="An own PostgreSQL ≥ 15. None is the embedded one: the first start needs no decision.",
            extra={"allowed": "a URL such as postgres://user:password@host:5432/database", "default": "embedded"},
        ),
    ] = None
    dsn_file: Annotated[
        Path | None,
        Meta(
            description="A file that holds the DSN, instead of `dsn`: container secrets and systemd credentials are "
            "files, and a variable can be read by whoever may inspect the process.",
        ),
    ] = None
    pool: Annotated[
        int,
        Meta(
            ge=2,
            le=1000,
            description="Connections of this node. One group commit, one event listener and short look-ups keep few "
            "busy, and ten nodes stay within PostgreSQL's usual 100.",
        ),
    ] = 10
    connect_timeout_seconds: Annotated[
        Seconds,
        Meta(description="A connection that takes longer is tried again; a distant server needs well under 1 s."),
    ] = 10.0
    statement_timeout_seconds: Annotated[
        Seconds,
        Meta(description="No statement of ours is long; one that is blocks a device that waits for its answer."),
    ] = 10.0


class Security(Section, frozen=True, kw_only=True):
    """Keys, operators, and how long anything is trusted without asking the database."""

    key_ring: Annotated[
        Path,
        Meta(
            description="The key-encryption keys, made with mode 0600 at the first start. Outside the database, so "
            "that a dump of it opens nothing. Nodes of one database share one ring.",
            extra={"default": "`secrets/key-ring.json` in the data directory"},
        ),
    ]
    operator_jwks: Annotated[
        Path | None,
        Meta(
            description="JSON Web Key Set with Ed25519 keys of an own identity provider, beside the built-in issuer.",
            extra={"default": "the built-in issuer alone"},
        ),
    ] = None
    operator_issuers: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=512)], ...],
        Meta(
            max_length=100,
            description="`iss` values accepted from the keys of `operator_jwks`. Empty: any but our own, since whoever "
            "holds a key of the set can write any of them.",
            extra={"default": "any"},
        ),
    ] = ()
    operator_token_max_seconds: Annotated[
        int,
        Meta(
            ge=60,
            le=31_536_000,
            description="Longest life of an operator's token that is accepted. A token cannot be revoked before its "
            "end; a day bounds what a stolen one is worth.",
        ),
    ] = 86_400
    rotation_overlap_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=31_536_000,
            description="How long the old credential stays valid after a rotation that names no overlap. A device that "
            "wakes once a day still gets to switch.",
        ),
    ] = 86_400
    feed_grace_seconds: Annotated[
        Annotated[float, Meta(ge=0.5, le=3600)],
        Meta(
            description="A node that cannot reach the database for longer admits nobody new and trusts no cached "
            "credential: it would not hear of a revocation. Longer than a failover, shorter than an incident.",
        ),
    ] = 10.0
    session_sweep_seconds: Annotated[
        Annotated[float, Meta(ge=1, le=3600)],
        Meta(description="Every so often live sessions are compared with the store, in case a wake-up was lost."),
    ] = 30.0
    teardown_seconds: Annotated[
        Annotated[float, Meta(ge=0.1, le=60)],
        Meta(
            description="A revoked session that did not close politely by then is aborted. A round trip over 2G fits."
        ),
    ] = 2.0
    credential_cache_entries: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="Resolved credentials kept in memory, about 1 KB each. 0 asks the database every time.",
        ),
    ] = 50_000
    certificate_days: Annotated[
        int,
        Meta(
            ge=1,
            le=3650,
            description="Validity of a device's certificate. Devices are advised to renew after two thirds of it, so a "
            "year leaves four months for one that sleeps.",
        ),
    ] = 365
    renewal_grace_days: Annotated[
        int,
        Meta(
            ge=0,
            le=365,
            description="How long after its end a certificate may still ask for its successor, and do nothing else. A "
            "week gets a device home that was in a warehouse or without power.",
        ),
    ] = 7
    crl_url: Annotated[
        Annotated[str, Meta(pattern=r"\Ahttps?://[!-~]{1,500}\Z")] | None,
        Meta(
            description="Where issued certificates say that their revocation list is; `{issuer}` becomes the "
            "fingerprint of the authority. For other verifiers: this server does not need it.",
            extra={
                "allowed": "an http or https URL",
                "default": "this server's `/api/v1/ca/crl`, if `https.names` says what it is called and the port is "
                "fixed; else none",
            },
        ),
    ] = None


class Telemetry(Section, frozen=True, kw_only=True):
    """What is kept, and for how long."""

    retention_days: Annotated[
        int,
        Meta(
            ge=0,
            le=36_500,
            description="Days of uplinks that are kept; older daily partitions are dropped. A season of history "
            "without a disk that grows for ever. 0 keeps everything.",
        ),
    ] = 90
    event_days: Annotated[
        int,
        Meta(
            ge=0,
            le=36_500,
            description="Days of events, and so of device timelines, and of finished commands. Whoever follows events "
            "by cursor must come back within them. 0 keeps everything.",
        ),
    ] = 90
    audit_days: Annotated[
        int,
        Meta(ge=0, le=36_500, description="Days of audit rows: who changed what. 0 keeps everything."),
    ] = 0


class Node(Section, frozen=True, kw_only=True):
    """This process among the nodes of one database."""

    id: Annotated[
        str,
        Meta(
            pattern=r"\A[a-z0-9][a-z0-9-]{0,62}\Z",
            description="Name of this node in sessions, events and receipts. Set it where host names change, as in "
            "containers.",
            extra={
                "allowed": "1 to 63 of a-z, 0-9 and -, not starting with -",
                "default": "host name and a hash of the data directory",
            },
        ),
    ]
    drain_seconds: Annotated[
        Annotated[float, Meta(ge=0, le=3600)],
        Meta(description="After SIGTERM requests in flight may take this long. Docker kills after 10 s."),
    ] = 8.0


class Logs(Section, frozen=True, kw_only=True):
    """Logs: JSON lines on stderr."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="The least that is written. Debug names every connection."),
    ] = "info"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration, complete: made by `load` only."""

    data_dir: Annotated[
        Path,
        Meta(
            description="What this node keeps: embedded database, secrets, `ca-chain.pem`. Not shared between nodes.",
            extra={"default": "`/var/lib/gatehouse` for root, else `${XDG_DATA_HOME:-~/.local/share}/gatehouse`"},
        ),
    ]
    database: Database = Database()
    https: Https = Https()
    mqtt: Mqtt = Mqtt()
    coap: Coap = Coap()
    lwm2m: Lwm2m = Lwm2m()
    ops: Ops = Ops()
    security: Security
    limits: Limits = Limits()
    telemetry: Telemetry = Telemetry()
    node: Node
    logs: Logs = Logs()


SECTIONS: Mapping[str, type[Section]] = {
    "database": Database,
    "https": Https,
    "mqtt": Mqtt,
    "coap": Coap,
    "lwm2m": Lwm2m,
    "ops": Ops,
    "security": Security,
    "limits": Limits,
    "telemetry": Telemetry,
    "node": Node,
    "logs": Logs,
}
KEYS: Mapping[tuple[str, str], Key] = {
    (key.section, key.name): key
    for key in (*keys_of("", Config), *(key for name, cls in SECTIONS.items() for key in keys_of(name, cls)))
}
