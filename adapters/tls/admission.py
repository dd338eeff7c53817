"""Who may start a handshake: limits, their counters, and the ledger of handshakes in flight.

Theory
------
An unauthenticated peer costs us a socket, some 20 KB and about a millisecond of handshake. So before any of that is
spent, four doors are counted: connections, and handshakes in flight, each in all and from one address. Whoever has one
address can neither shake hands without end nor hold every connection there is. An address is a whole IPv4 address or
an IPv6 /64, the smallest block that one customer is given (RFC 6177). A connection holds one place in `Ledger` until it
ends, and a second one until its handshake does; the stream gives each back exactly once.

When every place for handshakes is taken, the address that holds the most of them gives one up, its oldest, to a
newcomer whose address will then hold no more than that one keeps. So a crowd of strays from few addresses shuts
nobody out, shares come out even (max-min fairness), and an address with a single handshake never loses it, whoever
comes and however often. An attacker has to hold as many addresses as there are places before newcomers are refused,
and then only until `handshake_timeout`. Everything runs on one event loop; nothing can race.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import AddressValueError, IPv6Address
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TlsLimits:
    """Bounds of one listener. Times in seconds, sizes in bytes."""

    handshake_timeout: float = 10.0  # generous for a 2G modem with a 4096-bit key, short for a silent socket
    handshakes_in_flight: int = 1024  # x about 50 KB while shaking hands: 50 MB at the very worst
    handshakes_per_address: int = 128  # a site behind one NAT may reconnect at once after a power cut
    connections: int = 20_000  # x at most 45 KB: under 1 GB
    connections_per_address: int = 2_000  # a large site behind one NAT; a tenth of all, so one address leaves nine
    handshake_bytes: int = 32_768  # hello, ticket and a chain of three 4096-bit certificates fit in 12 KB
    write_high_water: int = 65_536  # above this the protocol is asked to stop writing
    write_low_water: int = 16_384
    unsolicited_bytes: int = 16_384  # TLS answers (key updates, alerts) queued for a peer that does not read
    linger: float = 5.0  # how long a closing connection may take to hand over its last bytes
    backlog: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.write_low_water <= self.write_high_water:
            raise ValueError(f"write_low_water {self.write_low_water} exceeds write_high_water {self.write_high_water}")


class Drop(StrEnum):
    """Why a connection ended by our decision or its fault. The value names the counter."""

    CONNECTION_LIMIT = "dropped_connection_limit"
    HANDSHAKE_LIMIT = "dropped_handshake_limit"
    ADDRESS_LIMIT = "dropped_address_limit"
    ADDRESS_CONNECTIONS = "dropped_address_connections"
    HANDSHAKE_TIMEOUT = "dropped_handshake_timeout"
    HANDSHAKE_DISPLACED = "dropped_handshake_displaced"
    HANDSHAKE_OVERSIZED = "dropped_handshake_oversized"
    HANDSHAKE_FAILED = "dropped_handshake_failed"
    HANDSHAKE_TRUNCATED = "dropped_handshake_truncated"
    PLAINTEXT = "dropped_plaintext"
    GARBAGE = "dropped_garbage"
    RENEGOTIATION = "dropped_renegotiation"
    FLOOD = "dropped_flood"
    LINGER = "dropped_linger"


class TlsCounters:
    """Plain counts of one listener since it was made; `open` and `handshaking` are how many there are now."""

    __slots__ = (
        "accepted",
        "client_certificates",
        "dropped_address_connections",
        "dropped_address_limit",
        "dropped_connection_limit",
        "dropped_flood",
        "dropped_garbage",
        "dropped_handshake_displaced",
        "dropped_handshake_failed",
        "dropped_handshake_limit",
        "dropped_handshake_oversized",
        "dropped_handshake_timeout",
        "dropped_handshake_truncated",
        "dropped_linger",
        "dropped_plaintext",
        "dropped_renegotiation",
        "established",
        "handshaking",
        "open",
        "resumed",
        "truncated",
    )

    def __init__(self) -> None:
        self.accepted = 0
        self.established = 0
        self.resumed = 0
        self.client_certificates = 0
        self.open = 0
        self.handshaking = 0
        self.truncated = 0  # ended by the peer without close_notify; common and harmless for framed protocols
        self.dropped_connection_limit = 0
        self.dropped_handshake_limit = 0
        self.dropped_address_limit = 0
        self.dropped_address_connections = 0
        self.dropped_handshake_timeout = 0
        self.dropped_handshake_displaced = 0
        self.dropped_handshake_oversized = 0
        self.dropped_handshake_failed = 0
        self.dropped_handshake_truncated = 0
        self.dropped_plaintext = 0
        self.dropped_garbage = 0
        self.dropped_renegotiation = 0
        self.dropped_flood = 0
        self.dropped_linger = 0

    def drop(self, reason: Drop) -> None:
        """Count one dropped connection."""
        setattr(self, reason.value, getattr(self, reason.value) + 1)

    def as_dict(self) -> dict[str, int]:
        """All counts by name, for the metrics page."""
        return {name: getattr(self, name) for name in self.__slots__}


class Handshake(Protocol):
    """One in flight, as the ledger knows it."""

    def displace(self) -> None:
        """Give up the place, by `Ledger.handshake_ended`, and end. Called at most once, while it holds the place."""


class Ledger:
    """Counts connections and handshakes in flight, says which limit a newcomer would break, and who gives way."""

    __slots__ = ("_connections", "_counters", "_handshakes", "_limits", "_most", "_ranks")

    def __init__(self, limits: TlsLimits, counters: TlsCounters) -> None:
        self._limits = limits
        self._counters = counters
        self._connections: dict[str, int] = {}
        self._handshakes: dict[str, dict[Handshake, None]] = {}
        """By block, oldest first."""
        self._ranks: dict[int, dict[str, None]] = {}
        """Blocks by how many handshakes they hold, so that the greediest is found at once."""
        self._most = 0

    def admit(self, address: str, handshake: Handshake) -> Drop | None:
        """Take a place for a handshake from `address`, or say which limit refuses it (and take none).

        Where that is the only way, another handshake is displaced before this returns.
        """
        limits = self._limits
        if self._counters.open >= limits.connections:
            return Drop.CONNECTION_LIMIT
        block = address_block(address)
        held = self._connections.get(block, 0)
        shaking = len(self._handshakes.get(block, ()))
        if shaking >= limits.handshakes_per_address:
            return Drop.ADDRESS_LIMIT
        if held >= limits.connections_per_address:
            return Drop.ADDRESS_CONNECTIONS
        if self._counters.handshaking >= limits.handshakes_in_flight and not self._displaced_for(shaking):
            return Drop.HANDSHAKE_LIMIT
        self._handshakes.setdefault(block, {})[handshake] = None
        self._rank(block, shaking, shaking + 1)
        self._connections[block] = held + 1
        self._counters.handshaking += 1
        self._counters.open += 1
        return None

    def handshake_ended(self, address: str, handshake: Handshake) -> None:
        """Give the handshake's place back; the connection, if it lives, keeps its own."""
        block = address_block(address)
        shaking = self._handshakes[block]
        del shaking[handshake]
        self._rank(block, len(shaking) + 1, len(shaking))
        if not shaking:
            del self._handshakes[block]
        self._counters.handshaking -= 1

    def connection_ended(self, address: str) -> None:
        """Give the connection's place back."""
        _one_less(self._connections, address_block(address))
        self._counters.open -= 1

    def _displaced_for(self, shaking: int) -> bool:
        """Make room for somebody whose block holds `shaking` handshakes; False: nobody holds so many more."""
        if self._most <= shaking + 1:
            return False
        greediest = next(iter(self._ranks[self._most]))
        oldest = next(iter(self._handshakes[greediest]))
        oldest.displace()
        return True

    def _rank(self, block: str, before: int, after: int) -> None:
        if before:
            peers = self._ranks[before]
            del peers[block]
            if not peers:
                del self._ranks[before]
        if after:
            self._ranks.setdefault(after, {})[block] = None
        if after > self._most or (before == self._most and before not in self._ranks):
            self._most = after  # steps are of one: if nobody is left at the top, this block is next to it


def _one_less(held: dict[str, int], block: str) -> None:
    left = held[block] - 1
    if left:
        held[block] = left
    else:
        del held[block]


def address_block(address: str) -> str:
    """The block that shares one allowance: the address itself for IPv4 (also mapped into IPv6), the /64 for IPv6."""
    if ":" not in address:
        return address
    try:
        parsed = IPv6Address(address.partition("%")[0])
    except AddressValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{int(parsed) >> 64:016x}::/64"
