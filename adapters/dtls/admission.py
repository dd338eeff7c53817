"""Who may start a handshake over datagrams: limits, their counters, and the ledger of handshakes and associations.

Theory
------
A stranger costs nothing but an HMAC until it has shown that it can read at its address (cookie.py). From then on it
costs an OpenSSL object, so four things are counted, as over TLS: associations, and handshakes in flight, each in all
and from one address block. A place is taken once and given back exactly once.

Refusing newcomers at a full house would let whoever fills it keep everybody out for as long as a handshake may take.
So a newcomer takes the place of the oldest handshake that has not come back since its first flight, of the same block
when that one is full: somebody who answers in one round trip gets in during any flood that is slower than that.
A handshake that has come back is on its way, however slow its path. But to come back takes a datagram only, and whoever
sends one and then nothing must not keep the places either. So when less than a quarter of them have not come back yet,
the oldest of the others gives way first: in its own block once it has had `stalled_after`; over all blocks one of the
block that has most such, at once to a block that then holds no more, else likewise. A flood of handshakes that never
come back thus leaves alone whoever has, and a flood of those that come back and stop keeps out its own addresses only,
and those only if it begins all of its handshakes anew every few seconds.

Whoever can do a handshake without a credential could fill the table of associations instead. So an association is
nobody's until the application says that it is kept; at a full table, or a full block, the oldest of nobody's gives way
first, before any handshake does. A peer that is being judged is the newest of them.

    started ──second flight──▶ returned ──verified──▶ nobody's association ──kept──▶ somebody's
       └─ may be displaced        │                      └─ gives way at a full table
                                  └─ keeps its place until `handshake_timeout`, or may be displaced when so many
                                     have stalled that newcomers have too little room

Everything runs on one event loop; nothing can race.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from adapters.tls.admission import address_block

_FRESH_SHARE: Final = 4
"""One in so many places is for handshakes that have not come back yet: 64 of 256, which even at 600 newcomers a second
leaves each of them 100 ms to do so."""


@dataclass(frozen=True, slots=True)
class DtlsLimits:
    """Bounds of one listener. Times in seconds, sizes in bytes."""

    handshake_timeout: float = 30.0  # five retransmissions of OpenSSL's 1, 2, 4, 8 … s: a bad radio link gets through
    handshakes_in_flight: int = 1024  # x about 100 KB while shaking hands: 100 MB at the very worst
    handshakes_per_address: int = 256  # a site behind one NAT may reconnect at once after a power cut
    associations: int = 20_000  # x about 70 KB: 1.4 GB
    associations_per_address: int = 5_000  # datagram devices sit behind carriers' NATs, many to an address
    stalled_after: float = (
        4.0  # since it came back: a client sends a lost flight again after 1 s and 2 s more, RFC 6347
    )
    # §4.2.4.1, and has half a second for each; longer only where nobody else wants the place
    idle_timeout: float = 7_200.0  # who reports every hour keeps its association; what a NAT left behind goes
    cookie_lifetime: float = 60.0  # a client answers in a round trip; an hour-old cookie is somebody's collection
    held_datagrams: int = 16  # that may wait for a key: a flight of small fragments
    handshake_bytes: int = 65_536  # a chain of three 4096-bit certificates, sent again six times
    handshake_early_records: int = 32  # of the next epoch, which OpenSSL keeps whole buffers for
    mtu: int = 1_200  # UDP payload that nearly every path carries (RFC 9000 §14.1 stands on the same figure)
    fallback_mtu: int = 528  # what is left of IPv4's 576 (RFC 791) after IPv6 + UDP headers; used after a lost flight
    receive_buffer: int = 4_194_304  # of the socket: a second of a flood of small datagrams
    strangers: int = 2_048  # datagrams of them that wait for their turn: half a second's work, less than clients wait
    batch: int = 64  # datagrams in one go before other work of the loop gets its turn: some 3 ms

    def __post_init__(self) -> None:
        if not 256 <= self.fallback_mtu <= self.mtu <= 16_384:
            raise ValueError(
                f"mtu {self.mtu} and fallback_mtu {self.fallback_mtu}: allowed are 256 ≤ fallback ≤ mtu ≤ 16384"
            )


class Drop(StrEnum):
    """Why a datagram, a handshake or an association came to nothing. The value names the counter."""

    GARBAGE = "dropped_garbage"
    STRAY = "dropped_stray"
    COOKIE = "dropped_cookie"
    VERSION = "dropped_version"
    HANDSHAKE_LIMIT = "dropped_handshake_limit"
    ADDRESS_LIMIT = "dropped_address_limit"
    ASSOCIATION_LIMIT = "dropped_association_limit"
    ADDRESS_ASSOCIATIONS = "dropped_address_associations"
    DISPLACED = "dropped_displaced"
    HANDSHAKE_TIMEOUT = "dropped_handshake_timeout"
    HANDSHAKE_OVERSIZED = "dropped_handshake_oversized"
    HANDSHAKE_FAILED = "dropped_handshake_failed"
    WRONG_KEY = "dropped_wrong_key"
    CERTIFICATE = "dropped_certificate"
    KEY_UNAVAILABLE = "dropped_key_unavailable"
    HELD = "dropped_held"
    CROWDED = "dropped_crowded"
    UNSENT = "dropped_unsent"


class DtlsCounters:
    """Plain counts of one listener since it was made; `open` and `handshaking` are how many there are now."""

    __slots__ = (
        "aborted",
        "challenged",
        "client_certificates",
        "closed_by_peer",
        "dropped_address_associations",
        "dropped_address_limit",
        "dropped_association_limit",
        "dropped_certificate",
        "dropped_cookie",
        "dropped_crowded",
        "dropped_displaced",
        "dropped_garbage",
        "dropped_handshake_failed",
        "dropped_handshake_limit",
        "dropped_handshake_oversized",
        "dropped_handshake_timeout",
        "dropped_held",
        "dropped_key_unavailable",
        "dropped_stray",
        "dropped_unsent",
        "dropped_version",
        "dropped_wrong_key",
        "established",
        "handshaking",
        "idle",
        "open",
        "psk",
        "replaced",
        "retransmitted",
        "started",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    aborted: int  # by a fatal alert or a broken record of an established peer
    challenged: int  # answered with a cookie
    client_certificates: int
    closed_by_peer: int
    established: int
    handshaking: int
    idle: int  # ended after their silence
    open: int
    psk: int
    replaced: int  # by a new handshake from the same address and port
    retransmitted: int  # flights
    started: int  # handshakes with a good cookie

    def drop(self, reason: Drop) -> None:
        """Count one."""
        setattr(self, reason.value, getattr(self, reason.value) + 1)

    def as_dict(self) -> dict[str, int]:
        """All counts by name, for the metrics page."""
        return {name: getattr(self, name) for name in self.__slots__}


class Place:
    """What one handshake, and the association that it becomes, holds in the ledger."""

    __slots__ = ("block", "kept", "returned", "shaking")

    def __init__(self, block: str) -> None:
        self.block = block
        self.shaking = True
        self.returned: float | None = None
        """When its second flight came."""
        self.kept = False


class Ledger:
    """Counts associations and handshakes in flight, says which limit a newcomer would break, and who may give way."""

    __slots__ = ("_blocks", "_counters", "_crowds", "_fresh", "_largest", "_limits", "_nobodies")

    def __init__(self, limits: DtlsLimits, counters: DtlsCounters) -> None:
        self._limits = limits
        self._counters = counters
        self._blocks: dict[str, _Block] = {}
        self._fresh: dict[Place, None] = {}  # in the order in which they came
        self._crowds: dict[int, dict[_Block, None]] = {}  # blocks by how many handshakes of theirs have come back
        self._largest = 0  # of these numbers
        self._nobodies: dict[Place, None] = {}  # associations that are not kept, in the order in which they verified

    def admit(self, address: str, now: float) -> Place | Drop | GiveWay:
        """Take a place for a handshake from `address`, or say what stands in the way (and take none). `now` is seconds
        on the clock of `returned`.

        `GiveWay` names the handshake or the association whose end (by `ended`) makes room; the caller ends it and asks
        again.
        """
        limits, counters = self._limits, self._counters
        block = address_block(address)
        held = self._blocks.get(block)
        if held is not None and held.shaking >= limits.handshakes_per_address:
            return self._handshake_of(held, now) or Drop.ADDRESS_LIMIT
        if counters.handshaking >= limits.handshakes_in_flight:
            return self._handshake(held, now) or Drop.HANDSHAKE_LIMIT
        if counters.open + counters.handshaking >= limits.associations:
            return _oldest(self._nobodies) or self._handshake(held, now) or Drop.ASSOCIATION_LIMIT
        if held is not None and held.open + held.shaking >= limits.associations_per_address:
            return _oldest(held.nobodies) or self._handshake_of(held, now) or Drop.ADDRESS_ASSOCIATIONS
        if held is None:
            held = self._blocks[block] = _Block()
        place = Place(block)
        held.shaking += 1
        held.fresh[place] = None
        self._fresh[place] = None
        counters.handshaking += 1
        return place

    def returned(self, place: Place, now: float) -> None:
        """The handshake has come back with its second flight, or some of it: it keeps its place for a while."""
        if place.returned is None:
            place.returned = now
            held = self._blocks[place.block]
            del self._fresh[place], held.fresh[place]
            held.returned[place] = None
            self._count(held, 1)

    def verified(self, place: Place) -> None:
        """The handshake has become an association, nobody's for now."""
        held = self._blocks[place.block]
        self._shaken(place, held)
        held.open += 1
        held.nobodies[place] = None
        self._nobodies[place] = None
        self._counters.open += 1

    def kept(self, place: Place) -> None:
        """The association is somebody's: it gives way to nobody."""
        if not place.kept:
            place.kept = True
            del self._nobodies[place]
            del self._blocks[place.block].nobodies[place]

    def ended(self, place: Place) -> None:
        """Give the place back; exactly once."""
        held = self._blocks[place.block]
        if place.shaking:
            self._shaken(place, held)
        else:
            self.kept(place)
            held.open -= 1
            self._counters.open -= 1
        if not held.shaking and not held.open:
            del self._blocks[place.block]

    def _shaken(self, place: Place, held: _Block) -> None:
        """The handshake is over."""
        if place.returned is None:
            del self._fresh[place], held.fresh[place]
        else:
            del held.returned[place]
            self._count(held, -1)
        place.shaking = False
        held.shaking -= 1
        self._counters.handshaking -= 1

    def _count(self, held: _Block, change: int) -> None:
        """One handshake more, or less, of a block has come back."""
        crowds, count = self._crowds, len(held.returned)
        if before := count - change:
            del crowds[before][held]
            if not crowds[before]:
                del crowds[before]
        if count:
            crowds.setdefault(count, {})[held] = None
        if count > self._largest or self._largest not in crowds:
            self._largest = count

    def _handshake(self, held: _Block | None, now: float) -> GiveWay | None:
        """The handshake that makes room where no place is left at all, to a newcomer of this block."""
        crowd = next(iter(self._crowds[self._largest])).returned if self._largest else {}
        fair = (0 if held is None else held.shaking) + 1 < self._largest
        return self._gives_way(self._fresh, crowd, self._counters.handshaking, now, 0.0 if fair else None)

    def _handshake_of(self, held: _Block, now: float) -> GiveWay | None:
        """The handshake that makes room where none is left for its block."""
        return self._gives_way(held.fresh, held.returned, held.shaking, now)

    def _gives_way(
        self,
        fresh: dict[Place, None],
        returned: dict[Place, None],
        most: int,
        now: float,
        patience: float | None = None,
    ) -> GiveWay | None:
        patience = self._limits.stalled_after if patience is None else patience
        oldest = next(iter(returned), None)
        if oldest is None or oldest.returned is None or len(fresh) >= most / _FRESH_SHARE:
            return _oldest(fresh)
        stalled = now - oldest.returned >= patience
        return GiveWay(oldest) if stalled else _oldest(fresh)


class _Block:
    __slots__ = ("fresh", "nobodies", "open", "returned", "shaking")

    def __init__(self) -> None:
        self.shaking = 0
        self.open = 0
        self.fresh: dict[Place, None] = {}
        self.returned: dict[Place, None] = {}  # in the order in which they did
        self.nobodies: dict[Place, None] = {}


@dataclass(frozen=True, slots=True)
class GiveWay:
    """The handshake, or the association of nobody's, that makes room."""

    place: Place


def _oldest(places: dict[Place, None]) -> GiveWay | None:
    return GiveWay(next(iter(places))) if places else None
