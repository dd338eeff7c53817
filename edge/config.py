"""The configuration: parsed once at the start, complete, frozen; nobody below `edge` reads a file or the environment.

Theory. `load` merges, from weak to strong: the defaults written here, `gatehouse.toml`, variables
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
from typing import IO, Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta

from edge.config_values import ConfigError, Key, Origin, Source, keys_of, parse_value, refused, unknown
from registry.secrets import Secret

__all__ = ["Config", "ConfigError", "describe", "load", "reference"]

PREFIX = "GATEHOUSE_"
SYSTEM_FILE = Path("/etc/gatehouse/gatehouse.toml")
MAX_FILE_BYTES = 1 << 20
"""A configuration larger than this is some other file given by mistake."""

_USUAL_HOSTS = {"127.0.0.1", "::1", "0.0.0.0", "::", "localhost"}  # noqa: S104 - compared with, not listened on
HOST_ALLOWED = {"allowed": "a host name or an IP address, without brackets or port"}
HOST_PATTERN = r"\A[A-Za-z0-9_.:%-]{1,255}\Z"
PORT_TEXT = "0 takes a free one and the ready line tells which"

Seconds = Annotated[float, Meta(ge=0.1, le=86_400)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


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


class Https(Section, frozen=True, kw_only=True):
    """HTTPS: devices with API keys, provisioning, operators, the console."""

    host: Annotated[
        str,
        Meta(pattern=HOST_PATTERN, description="Loopback until somebody decides to be reachable.", extra=HOST_ALLOWED),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description=f"The usual unprivileged HTTPS port; {PORT_TEXT}.")] = 8443
    certificate: Annotated[
        Path | None,
        Meta(
            description="PEM file, leaf first, then its chain; for MQTT and CoAP too. None: the built-in CA's.",
            extra={"default": "issued by the built-in CA"},
        ),
    ] = None
    key: Annotated[
        Path | None, Meta(description="PEM file with the private key of `certificate`. Both are given or neither.")
    ] = None
    names: Annotated[
        tuple[Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:*-]{1,253}\Z")], ...],
        Meta(
            max_length=100,
            description="More names and addresses for the issued certificate, beside localhost, 127.0.0.1, ::1 and the "
            "host's name: what the devices call this server.",
            extra={"allowed": "a list of at most 100 DNS names or IP addresses", "default": "none"},
        ),
    ] = ()
    websocket_origins: Annotated[
        tuple[Annotated[str, Meta(pattern=r"\A(\*|[a-z][a-z0-9+.-]{0,30}://[a-z0-9_.:\[\]-]{1,253})\Z")], ...],
        Meta(
            max_length=100,
            description="Web pages of other origins that may open MQTT over WebSocket at `/mqtt`, such as "
            "`https://console.example.org`; `*` lets in every page. This server's own origin always may, and clients "
            "that are no browsers send none. A browser shows its user's client certificate to whatever page asks.",
            extra={"allowed": "a list of at most 100 origins in lower case, without a path, or `*`", "default": "none"},
        ),
    ] = ()


class Mqtt(Section, frozen=True, kw_only=True):
    """MQTT 3.1.1 and 5 over TLS."""

    host: Annotated[
        str, Meta(pattern=HOST_PATTERN, description="Loopback until somebody decides otherwise.", extra=HOST_ALLOWED)
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description=f"The registered port of MQTT over TLS; {PORT_TEXT}.")] = 8883
    connect_seconds: Annotated[
        Seconds, Meta(description="From the end of the TLS handshake to a whole CONNECT. One round trip over 2G fits.")
    ] = 10.0
    packet_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 26,
            description="One packet, announced as Maximum Packet Size. A payload of the largest uplink fits.",
        ),
    ] = 288 << 10
    keep_alive_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=65_535,
            description="The longest keep-alive; clients of MQTT 5 that ask for more are told this one. A dead peer is "
            "noticed after one and a half times it. 0 allows any, and none.",
        ),
    ] = 3_600
    idle_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=31_536_000,
            description="A connection that is silent for so long is closed whatever its keep-alive is: MQTT 3.1.1 "
            "cannot be told a shorter one, and 0 means none. 0 allows any silence.",
        ),
    ] = 86_400
    receive_maximum: Annotated[
        int,
        Meta(
            ge=1,
            le=65_535,
            description="Messages of one connection that are being stored; then reading stops. Enough to fill a group "
            "commit.",
        ),
    ] = 256
    inflight: Annotated[
        int,
        Meta(ge=1, le=32_767, description="Messages to one client that it has not acknowledged. It may ask for less."),
    ] = 128
    queued_messages: Annotated[
        int,
        Meta(ge=1, le=32_767, description="Messages that wait for one session, also while it is offline."),
    ] = 1_000
    queued_bytes: Annotated[
        int, Meta(ge=1024, le=1 << 30, description="The same in bytes, so that few large ones cannot fill the memory.")
    ] = 1 << 20
    full_queue_seconds: Annotated[
        Annotated[float, Meta(ge=0, le=604_800)],
        Meta(
            description="A session with a full queue that takes nothing refuses every message of its topics, for all "
            "receivers. After so long it is ended with what it holds, and told so (0x97). 0: only when it expires.",
        ),
    ] = 10.0
    subscriptions: Annotated[
        int, Meta(ge=1, le=100_000, description="Filters of one session. A gateway needs one or two for each child.")
    ] = 128
    session_expiry_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=31_536_000,
            description="How long a session may outlive its connection at most, and does in MQTT 3.1.1. A device that "
            "was away for a week starts anew.",
        ),
    ] = 604_800
    provisioning_connections: Annotated[
        int, Meta(ge=1, le=100_000, description="Connections of user `provision` at once; they hold no credential.")
    ] = 500
    provisioning_seconds: Annotated[
        Seconds, Meta(description="Such a connection is closed after this. A claim over a slow radio takes 10 s.")
    ] = 60.0
    refused_wait_seconds: Annotated[
        Annotated[float, Meta(ge=0, le=60)],
        Meta(
            description="A credential that is refused again and again waits for its answer, longer each time, up to "
            "this. Below the 10 s after which impatient clients try again.",
        ),
    ] = 8.0


class Coap(Section, frozen=True, kw_only=True):
    """CoAP over DTLS 1.2."""

    host: Annotated[
        str, Meta(pattern=HOST_PATTERN, description="Loopback until somebody decides otherwise.", extra=HOST_ALLOWED)
    ] = "127.0.0.1"
    port: Annotated[
        int, Meta(ge=0, le=65535, description=f"The registered port of CoAP over DTLS (RFC 7252 §12.7); {PORT_TEXT}.")
    ] = 5684
    handshake_seconds: Annotated[
        Seconds, Meta(description="A DTLS handshake must be over by then: five retransmissions over a bad radio link.")
    ] = 30.0
    handshakes: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="DTLS handshakes in flight, beyond the cookie. Each takes about 100 KB."),
    ] = 1024
    handshakes_per_address: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="The same from one IPv4 address or IPv6 /64: a site behind one NAT comes back at once.",
        ),
    ] = 256
    associations: Annotated[
        int, Meta(ge=1, le=10_000_000, description="DTLS associations, 3 to 7 KB each beside their sessions.")
    ] = 20_000
    associations_per_address: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="The same from one IPv4 address or IPv6 /64. Radio devices sit behind carriers' NATs, many "
            "to an address.",
        ),
    ] = 5_000
    associations_per_device: Annotated[
        int,
        Meta(
            ge=1,
            le=100,
            description="Of one device. One that sleeps comes back from another port; of more than these the one that "
            "was silent longest ends.",
        ),
    ] = 8
    idle_seconds: Annotated[
        Annotated[float, Meta(ge=10, le=2_592_000)],
        Meta(description="A silent association is forgotten after this. Who reports every hour keeps its own."),
    ] = 7_200.0
    datagram_bytes: Annotated[
        int,
        Meta(
            ge=256,
            le=16_384,
            description="Largest UDP payload that is sent, handshakes included. 1,200 pass on nearly every path; a "
            "flight that is lost is sent again in pieces of 528.",
        ),
    ] = 1_200
    body_bytes: Annotated[
        int,
        Meta(
            ge=1_024,
            le=1 << 24,
            description="One block-wise upload. A backlog of telemetry fits; every peer may take twice as much.",
        ),
    ] = 65_536
    observations: Annotated[
        int, Meta(ge=1, le=1_000, description="What one association may observe: configuration, commands, and room.")
    ] = 16
    provisioning_associations: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="Associations at once that belong to nobody: claim PSKs, and peers without any credential.",
        ),
    ] = 500
    provisioning_seconds: Annotated[
        Annotated[float, Meta(ge=1, le=3600)],
        Meta(description="Such an association is closed after this: twice the time for which a request is repeated."),
    ] = 180.0


class Lwm2m(Section, frozen=True, kw_only=True):
    """LwM2M. Registration lives on the CoAP port; only bootstrap has its own. Reserved: nothing listens here yet."""

    host: Annotated[
        str, Meta(pattern=HOST_PATTERN, description="Loopback until somebody decides otherwise.", extra=HOST_ALLOWED)
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description=f"Bootstrap, next to the CoAP port; {PORT_TEXT}.")] = 5685


class Ops(Section, frozen=True, kw_only=True):
    """`/livez`, `/readyz` and `/metrics`, in plain HTTP and apart from everything that devices can reach."""

    host: Annotated[
        str,
        Meta(
            pattern=HOST_PATTERN,
            description="Loopback: these pages ask nobody for a credential, so opening them is a decision.",
            extra=HOST_ALLOWED,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Meta(ge=0, le=65535, description=f"In the range that Prometheus exporters use; {PORT_TEXT}.")
    ] = 9464


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


class Limits(Section, frozen=True, kw_only=True):
    """What one node lets anybody use up. Hitting a limit is counted in `gatehouse_limits_hit_total`."""

    header_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 20,
            description="Request line and headers of one HTTP request. A token and cookies take 4 KB.",
        ),
    ] = 16 << 10
    header_count: Annotated[
        int,
        Meta(ge=10, le=1000, description="Header fields of one HTTP request. Browsers behind proxies send about 30."),
    ] = 100
    body_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 30,
            description="Body of one HTTP request. A telemetry array of a day in one-minute steps fits.",
        ),
    ] = 1 << 20
    open_body_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 30,
            description="The same where the body is read before anybody is recognised: claims, tokens, enrolment. A "
            "request for a certificate takes 3 KB.",
        ),
    ] = 32 << 10
    import_body_bytes: Annotated[
        int, Meta(ge=1024, le=1 << 30, description="Body of a bulk import. 100,000 rows of about 300 bytes fit.")
    ] = 32 << 20
    header_timeout_seconds: Annotated[
        Seconds,
        Meta(description="From the first byte of a request to the end of its headers. 16 KiB over 2G takes 10 s."),
    ] = 10.0
    unauthenticated_body_seconds: Annotated[
        Seconds,
        Meta(
            description="The whole body of a request on a connection on which nobody has been recognised yet. Who is "
            "recognised only has to keep up the rate."
        ),
    ] = 30.0
    unauthenticated_bodies_per_address: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Unfinished bodies on such connections from one IPv4 address or IPv6 /64, up to 64 KiB each.",
        ),
    ] = 256
    min_body_rate_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 20,
            description="Bytes per second that a body must keep up after a grace period. A tenth of what GPRS gives.",
        ),
    ] = 200
    keep_alive_seconds: Annotated[
        Seconds,
        Meta(description="An idle HTTP connection is closed after this. Longer than the 60 s of most proxies' pools."),
    ] = 75.0
    unauthenticated_keep_alive_seconds: Annotated[
        Seconds,
        Meta(
            description="The same where nobody has been recognised. Long enough to repeat a refused request or to use "
            "a claimed key; nobody else has a reason to keep such a connection."
        ),
    ] = 10.0
    send_timeout_seconds: Annotated[
        Seconds,
        Meta(
            description="A peer that takes nothing of its answer for so long is cut; a quarter of it where nobody has "
            "been recognised. A device that loses its radio in the middle comes back by itself."
        ),
    ] = 60.0
    requests: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Complete HTTP requests being answered at once, without event streams and polls that wait; "
            "beyond it 503. What the database does not get done in a few seconds only makes everybody wait longer.",
        ),
    ] = 4096
    tls_handshake_seconds: Annotated[
        Seconds,
        Meta(description="A TLS handshake must be over by then. A slow radio needs four round trips of about 1 s."),
    ] = 10.0
    tls_handshakes: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="TLS handshakes in flight. Each costs about 1 ms of a core and 50 KB until it ends.",
        ),
    ] = 1024
    tls_handshakes_per_address: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="The same from one IPv4 address or IPv6 /64. A site of many devices behind one NAT comes back "
            "at once after a power cut; one address cannot take all.",
        ),
    ] = 256
    connections: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Open TCP connections of all listeners, about 50 KB each: 1 GB. Also needs that many file "
            "descriptors (`ulimit -n`).",
        ),
    ] = 20_000
    connections_per_address: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="The same from one IPv4 address or IPv6 /64: one peer without any credential cannot hold them "
            "all. Raise it for a larger site behind one NAT; as high as `connections` behind a balancer that hides "
            "addresses.",
        ),
    ] = 2_000
    sessions: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Authenticated sessions of all transports; those over DTLS need no socket each.",
        ),
    ] = 50_000
    sessions_per_device: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="Of one device. A gateway with a pool of connections fits, a runaway loop does not.",
        ),
    ] = 100
    uplink_queue: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Uplinks waiting for the group commit; when full, senders are told to retry.",
        ),
    ] = 10_000
    uplink_queue_bytes: Annotated[
        int,
        Meta(
            ge=1 << 16,
            le=1 << 34,
            description="The same in bytes of payload, so that few large uplinks cannot fill the memory.",
        ),
    ] = 64 << 20
    uplink_payload_bytes: Annotated[
        int,
        Meta(
            ge=64,
            le=1 << 26,
            description="Payload of one uplink. A row far beyond PostgreSQL's page is no reading any more.",
        ),
    ] = 256 << 10
    tenant_requests_per_second: Annotated[
        Annotated[float, Meta(ge=0.1, le=1_000_000)],
        Meta(
            description="Requests of one tenant's devices on this node, and as many of its operators: a flood of "
            "devices keeps nobody from revoking them. More than one node serves; lower it to share a node."
        ),
    ] = 10_000.0
    tenant_requests_burst: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Requests that a tenant may send at once after a pause: two seconds' worth.",
        ),
    ] = 20_000
    key_requests_per_second: Annotated[
        Annotated[float, Meta(ge=0.1, le=1_000_000)],
        Meta(
            description="Requests with one credential, or of one operator. A gateway that sends for hundreds of "
            "children stays below it."
        ),
    ] = 2_000.0
    key_requests_burst: Annotated[
        int,
        Meta(
            ge=1, le=10_000_000, description="Requests with one credential at once after a pause: a gateway's backlog."
        ),
    ] = 10_000
    provisioning_attempts_per_second: Annotated[
        Annotated[float, Meta(ge=0.1, le=1_000_000)],
        Meta(
            description="Claims and token redemptions from one address. The keys cannot be guessed, so this is about "
            "load: a factory line behind one address stays below it.",
        ),
    ] = 100.0
    provisioning_attempts_burst: Annotated[
        int,
        Meta(ge=1, le=10_000_000, description="The same at once after a pause: a rack of devices that boots together."),
    ] = 1_000
    open_requests_per_second: Annotated[
        Annotated[float, Meta(ge=0.1, le=1_000_000)],
        Meta(
            description="Requests that need no credential, from one address: the API's description, its page, and the "
            "CA's chain and list. Devices fetch the chain once."
        ),
    ] = 100.0
    open_requests_burst: Annotated[
        int,
        Meta(ge=1, le=10_000_000, description="The same at once after a pause: a site that boots together."),
    ] = 2_000
    failed_authentications_per_second: Annotated[
        Annotated[float, Meta(ge=0.1, le=1_000_000)],
        Meta(
            description="Requests with a credential that is not accepted, from one address. Beyond it 429 instead of "
            "401, and credentials that this node does not remember are looked up at ten times this rate only."
        ),
    ] = 10.0
    failed_authentications_burst: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="The same at once after a pause. A site whose keys have just been revoked comes back at once, "
            "and is told the truth.",
        ),
    ] = 500
    sse_streams: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="Open event streams. Each is a console or an integration, not a device."),
    ] = 1_000
    sse_streams_per_tenant: Annotated[
        int, Meta(ge=1, le=1_000_000, description="The same for one tenant, so that one cannot take them all.")
    ] = 100
    commands_per_device: Annotated[
        int,
        Meta(ge=1, le=100_000, description="Commands of one device that are not finished. Nobody means more for one."),
    ] = 1_000
    command_waits: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="HTTP polls that wait for a command, about 10 KB each."),
    ] = 20_000
    children_per_gateway: Annotated[
        int,
        Meta(
            ge=1, le=1_000_000, description="Children that a gateway may attach: the largest radio networks behind one."
        ),
    ] = 10_000


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


def reference() -> str:
    """`docs/configuration.md`, made from the structures of this file."""
    lines = [
        "# Configuration",
        "",
        "<!-- Made by `python -m edge.config`; change edge/config.py instead. -->",
        "",
        "Every key has a default that works, and a reason for it. A key is set in `gatehouse.toml` or by the variable",
        "next to it, which beats the file; `--data-dir` beats both. The file is `--config F`, else",
        "`$GATEHOUSE_CONFIG`, else `gatehouse.toml` in the current directory, else `/etc/gatehouse/gatehouse.toml`.",
        "",
        "- Root reads the file in the current directory unasked only if it is root's and nobody else may write it.",
        "- A relative path in the file starts at the file's directory; anywhere else at the current directory.",
        "- Lists in variables are JSON or separated by commas. An empty variable counts as not set.",
        "- An unknown key, section or variable, a wrong type or a value out of range stops the start with exit code 2,",
        "  before any socket opens; the message names the key, the reason and what is allowed.",
        "- `gatehouse check-config` shows what a node would run with, secrets masked.",
        "",
        "```toml",
        'data_dir = "/srv/gatehouse"',
        "",
        "[https]",
        'host = "0.0.0.0"',
        'names = ["gate.example.org"]',
        "",
        "[telemetry]",
        "retention_days = 30",
        "```",
        "",
        "## Top level",
        "",
        *_table(""),
    ]
    for name, structure in SECTIONS.items():
        lines += ["", f"## [{name}]", "", (structure.__doc__ or "").strip(), "", *_table(name)]
    return "\n".join(lines) + "\n"


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


def _table(section: str) -> list[str]:
    rows = ["| Key | Variable | Default | Allowed | What, and why this default |", "|---|---|---|---|---|"]
    for key in KEYS.values():
        if key.section == section:
            cells = (f"`{key.name}`", f"`{key.variable}`", _default(key), key.allowed, key.description)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _default(key: Key) -> str:
    if key.default_text is not None:
        return key.default_text
    match key.default:
        case None:
            return "none"
        case bool():
            return str(key.default).lower()
        case int():
            return f"{key.default:,}" if key.default > 9999 and key.name != "port" else str(key.default)
        case float():
            return f"{key.default:,g}"
        case _:
            return f"`{key.default}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
