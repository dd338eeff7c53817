"""Where a node listens, and what it takes from a connection: the sections of the listeners.

Theory. A value's name, type, bounds, default and reason stand in one place, its field; `docs/configuration.md` is made
of them. Nothing here reads anything (config.py does).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta

from edge.config_values import Seconds, Section

HOST_ALLOWED = {"allowed": "a host name or an IP address, without brackets or port"}
HOST_PATTERN = r"\A[A-Za-z0-9_.:%-]{1,255}\Z"
PORT_TEXT = "0 takes a free one and the ready line tells which"


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
