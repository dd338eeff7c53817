"""How much a node takes from whom: the section `[limits]`.

Theory. A value's name, type, bounds, default and reason stand in one place, its field; `docs/configuration.md` is made
of them. Nothing here reads anything (config.py does).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edge.config_values import Seconds, Section


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
            "CA's chain and list; over CoAP all that peers who are no device ask. Devices fetch the chain once."
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
