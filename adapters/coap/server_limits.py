"""The bounds of the CoAP server as a whole, each with its reason; the message layer's are in limits.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Times in seconds, sizes in bytes."""

    associations_per_device: int = 8
    """A device that sleeps comes back from another port, and its old association stays until it is reaped; of more than
    these the one that was silent longest ends. A gateway may keep a few."""
    provisioning: int = 500
    """Associations at once that belong to nobody: so many with a claim PSK, and so many that proved nothing."""
    provisioning_per_address: int = 64  # of these; a rack of devices that boots together comes in turns
    provisioning_seconds: float = 180.0
    """Of one: twice the time for which a client repeats a request (RFC 7252 §4.8.2), with a claim in between."""
    turned_away_linger: float = 8.0
    """How long one for whom there was no room may ask again, before its association is closed: it is told to wait 5."""
    provisioning_attempts: int = 20  # requests to provision on one such association
    provisioning_attempts_per_second: float = 100.0  # from one address, as over HTTPS
    provisioning_attempts_burst: int = 1_000
    open_requests_per_second: float = 100.0  # from one address, of all there that are no device; as over HTTPS
    open_requests_burst: int = 2_000
    key_requests_per_second: float = 2_000.0  # with one credential, as over HTTPS
    key_requests_burst: int = 10_000
    tenant_requests_per_second: float = 10_000.0  # of one tenant's devices
    tenant_requests_burst: int = 20_000
    refused_linger: float = 1.0
    """How long a refused peer may still ask, and be told 4.01, before its association is closed."""
    payload_bytes: int = 262_144  # of one uplink
    last_words: float = 1.0  # for answers under way when the drain is over
