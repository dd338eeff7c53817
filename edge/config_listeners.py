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
    connect_bytes: Annotated[
        int,
        Meta(
            ge=512,
            le=1 << 20,
            description="The same for CONNECT, before anybody is known. Ids, a key and a will of a few KB fit.",
        ),
    ] = 32 << 10
    packet_seconds: Annotated[
        Seconds,
        Meta(description="A packet that has begun must be whole by then, and so long after it as its bytes may take."),
    ] = 20.0
    stalled_seconds: Annotated[
        Seconds,
        Meta(description="A peer that takes next to nothing of what is sent to it for so long is cut."),
    ] = 20.0
    min_rate_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 20,
            description="Bytes per second that a slow link must manage, both ways. NB-IoT at its worst does a few "
            "hundred.",
        ),
    ] = 64
    client_id_bytes: Annotated[
        int,
        Meta(
            ge=23,
            le=2_048,
            description="A client id. The protocol asks for 23; people use UUIDs and names. A stored session is found "
            "by it, in an index that takes no more.",
        ),
    ] = 256
    topic_bytes: Annotated[
        int,
        Meta(
            ge=128,
            le=1_024,
            description="A topic name or filter. The longest topic of this server's own has 99; what is stored takes "
            "no more than the default.",
        ),
    ] = 1_024
    topic_levels: Annotated[
        int, Meta(ge=8, le=64, description="Levels of one, each a step of every search. Naming schemes use six.")
    ] = 64
    topic_aliases: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000,
            description="Topic aliases of one connection, in each direction, each a topic that is remembered.",
        ),
    ] = 16
    user_properties: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000,
            description="Of one packet, about 100 bytes each. Bridges and tracing use a handful.",
        ),
    ] = 64
    filters: Annotated[
        int, Meta(ge=1, le=10_000, description="In one SUBSCRIBE or UNSUBSCRIBE. Clients send more packets instead.")
    ] = 256
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
    unanswered_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 30,
            description="The same in bytes of payload, so that few large messages cannot fill the memory.",
        ),
    ] = 1 << 20
    unreleased: Annotated[
        int,
        Meta(
            ge=1,
            le=65_535,
            description="QoS 2 messages of one session that are stored and not released: MQTT 3.1.1 cannot be told a "
            "Receive Maximum. At least `receive_maximum`.",
        ),
    ] = 1_024
    unsent_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 26,
            description="Written for one client and not yet taken by the network. Beyond it QoS 0 is dropped, and the "
            "rest waits in its queue.",
        ),
    ] = 64 << 10
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
    stored_sessions_per_device: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000,
            description="Sessions of one device that outlive their connections. It needs one; client ids that change "
            "with every start must not pile up.",
        ),
    ] = 16
    publish_queue: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Messages among granted topics that wait to be stored; when full, senders are told to retry.",
        ),
    ] = 10_000
    publish_queue_bytes: Annotated[
        int, Meta(ge=1 << 16, le=1 << 34, description="The same in bytes, so that few large ones cannot fill it.")
    ] = 64 << 20
    tenant_queued_messages: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000_000,
            description="Messages in all queues of one tenant's sessions, by a figure that is some seconds old: one "
            "tenant must not fill the disk of all.",
        ),
    ] = 1_000_000
    tenant_queued_bytes: Annotated[
        int,
        Meta(
            ge=1 << 16,
            le=1 << 50,
            description="The same in bytes; a message that waits in many queues counts in each.",
        ),
    ] = 1 << 30
    retained_messages: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="Retained messages of one tenant. A subscription to everything is sent all of them.",
        ),
    ] = 10_000
    retained_bytes: Annotated[
        int, Meta(ge=0, le=1 << 40, description="The same in bytes, so that few large ones cannot fill the disk.")
    ] = 64 << 20
    provisioning_connections: Annotated[
        int, Meta(ge=1, le=100_000, description="Connections of user `provision` at once; they hold no credential.")
    ] = 500
    provisioning_connections_per_address: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="The same from one IPv4 address or IPv6 /64. A rack of devices that boots together comes in "
            "turns.",
        ),
    ] = 64
    provisioning_requests: Annotated[
        int, Meta(ge=1, le=10_000, description="Requests on one such connection. A device that fails may ask again.")
    ] = 20
    provisioning_seconds: Annotated[
        Seconds, Meta(description="Such a connection is closed after this. A claim over a slow radio takes 10 s.")
    ] = 60.0
    provisioning_silent_seconds: Annotated[
        Seconds, Meta(description="And after this, if it has asked nothing yet: places are for those who ask.")
    ] = 10.0
    refused_wait_seconds: Annotated[
        Annotated[float, Meta(ge=0, le=60)],
        Meta(
            description="A credential that is refused again and again waits for its answer, longer each time, up to "
            "this. Below the 10 s after which impatient clients try again.",
        ),
    ] = 8.0
    refused_waiting: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Refused connections that wait for their answers; beyond it they are closed at once.",
        ),
    ] = 1_000
    refusals_per_second: Annotated[
        Annotated[float, Meta(ge=0.1, le=1_000_000)],
        Meta(description="Refusals of one address that are answered at once; what comes above that waits, too."),
    ] = 20.0
    refusals_burst: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="The same at once after a pause. A site whose keys were revoked comes back at once.",
        ),
    ] = 200


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
