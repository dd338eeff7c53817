"""The bounds of the CoAP message layer, each with its reason, and its counts. Times in seconds, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoapLimits:
    """What one peer may take, and what all of them together may."""

    # Retransmission, RFC 7252 §4.8. Its defaults, on which the lifetimes below stand.
    ack_timeout: float = 2.0
    ack_random_factor: float = 1.5
    max_retransmit: int = 4
    ack_delay: float = 1.0  # until an empty ACK: half of the shortest wait of a client, so that it does not ask twice
    exchange_lifetime: float = 247.0  # a CON may come again for so long, §4.8.2
    non_lifetime: float = 145.0  # and a NON, §4.8.2

    # Requests
    requests_per_peer: int = 16  # being answered; NSTART asks for one, a gateway keeps a few
    requests: int = 4_096  # of all peers: what the store takes in a few group commits
    held_requests: int = 8  # of one peer whose admission is being decided: what it sends in that one moment
    busy_max_age: int = 5  # what a 5.03 says; a burst is over by then

    # Deduplication. An entry is about 400 bytes and its reply, which is small unless the resource answers much.
    duplicates_per_peer: int = 2_048  # in 45 s, the longest that a CON is repeated, 45 requests per second
    duplicate_bytes_per_peer: int = 524_288  # a few hundred replies of full size
    duplicate_bytes: int = 67_108_864  # of all devices: 150,000 requests, or 600 a second for 247 s; then the oldest
    # of who has most go
    duplicate_bytes_per_stranger: int = 32_768  # whose association is no device's: twenty replies of full size
    stranger_duplicate_bytes: int = 8_388_608  # of them all: one request of each of 20,000

    # Observations, RFC 7641
    observations_per_peer: int = 16  # config, commands, and room for what profiles may add
    confirm_every: int = 10  # for observers that asked by NON: each tenth notification is a CON, …
    confirm_interval: float = 3_600.0  # … and one after an hour; §4.5 wants one in 24 hours
    non_interval: float = 3.0  # between two NON notifications to one peer whose round trip nobody knows, §4.5.1

    # Block-wise, RFC 7959
    block_exponent: int = 6  # 1024 bytes, the most; smaller where the path has no room
    narrow_room: int = 480  # of a datagram where larger ones do not arrive: IPv4's 576 (RFC 791) less IP, UDP and DTLS
    body_bytes: int = 65_536  # of one upload: 64 KiB; a CSR has 1 to 4 KB, a backlog of telemetry the rest
    uploads_per_peer: int = 4
    upload_bytes_per_peer: int = 131_072  # two of the largest at once
    upload_bytes: int = 33_554_432  # of all devices: 512 of the largest, 8,000 CSRs
    stranger_upload_bytes: int = 8_388_608  # of all whose association is no device's, or not yet; of one of them one of
    # the largest, since it may be a device that begins to send while it is being judged: 127 of them, 2,000 CSRs
    upload_timeout: float = 247.0  # without a new block: the one before and the next may take 45 s each to get through,
    # and a slow path 100 s (EXCHANGE_LIFETIME, RFC 7252 §4.8.2); what it can hold meanwhile is bounded above
    snapshot_bytes_per_peer: int = 131_072
    snapshot_bytes: int = 33_554_432  # of all devices: 256 of the most, 10,000 certificates with their chains
    snapshot_bytes_per_stranger: int = 34_816
    stranger_snapshot_bytes: int = 4_194_304  # 1,200 certificates with their chains
    fetch_patience: float = 15.0  # for a body's next block, before a newer state takes its place: two losses in a row
    fetches_per_peer: int = 32  # bodies in blocks that are waited for; of more the oldest is not
    snapshot_timeout: float = 247.0  # likewise, since the last block was asked for

    def __post_init__(self) -> None:
        if not 0 <= self.block_exponent <= 6:
            raise ValueError(f"block_exponent {self.block_exponent}; the protocol allows 0 to 6")
        if self.narrow_room < 128:
            raise ValueError(f"narrow_room {self.narrow_room}; a block and its options need 128 at least")
        if not 0 <= self.max_retransmit <= 20:
            raise ValueError(f"max_retransmit {self.max_retransmit}; 0 to 20 make sense")
        if self.ack_timeout <= 0 or self.ack_random_factor < 1:
            raise ValueError("ack_timeout is more than 0 and ack_random_factor at least 1, RFC 7252 §4.8.1")
        if min(self.requests_per_peer, self.requests, self.duplicates_per_peer, self.confirm_every) < 1:
            raise ValueError("requests, requests_per_peer, duplicates_per_peer and confirm_every are at least 1")
        if self.body_bytes > self.upload_bytes_per_peer:
            raise ValueError(f"body_bytes {self.body_bytes} exceeds upload_bytes_per_peer {self.upload_bytes_per_peer}")


class CoapCounters:
    """Plain counts since the layer was made; `peers`, `serving` and `observations` are how many there are now."""

    __slots__ = (
        "acknowledgements",
        "bad_options",
        "busy",
        "cancelled_by_silence",
        "duplicates",
        "duplicates_forgotten",
        "failures",
        "given_up",
        "incomplete",
        "malformed",
        "narrowed",
        "notifications",
        "observations",
        "observations_refused",
        "peers",
        "received",
        "requests",
        "resets",
        "retransmissions",
        "sent",
        "serving",
        "snapshots_forgotten",
        "too_large",
    )

    def __init__(self) -> None:
        self.peers = 0
        self.serving = 0
        self.observations = 0
        self.received = 0
        self.sent = 0
        self.requests = 0
        self.duplicates = 0  # a message that had been taken before
        self.duplicates_forgotten = 0  # entries given up before their time, for want of memory
        self.malformed = 0
        self.bad_options = 0
        self.resets = 0  # that we sent
        self.acknowledgements = 0  # empty ones: the handler took its time
        self.retransmissions = 0
        self.given_up = 0  # our CONs that nobody acknowledged
        self.narrowed = 0  # peers that larger datagrams do not seem to reach
        self.notifications = 0
        self.observations_refused = 0  # the peer had too many; the request was answered as a plain one
        self.cancelled_by_silence = 0
        self.busy = 0  # 5.03 for want of room
        self.incomplete = 0  # 4.08
        self.too_large = 0  # 4.13
        self.snapshots_forgotten = 0  # answers in blocks given up before their time, for want of memory
        self.failures = 0  # 5.00: our bugs

    def as_dict(self) -> dict[str, int]:
        """All counts by name, for the metrics page."""
        return {name: getattr(self, name) for name in self.__slots__}
