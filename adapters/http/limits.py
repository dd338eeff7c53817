"""The bounds of the HTTPS server, with their reasons, and the counts of what hit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.tls.admission import address_block


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Times in seconds, sizes in bytes, rates in bytes per second.

    A connection is anonymous until the application has recognised somebody on it. An anonymous one costs its peer
    nothing, so it gets less: it is not kept idle, and has to finish what it sends and take what it asked for sooner.
    """

    max_target_bytes: int = 8_192  # RFC 9112 §3 asks for at least 8000
    max_header_bytes: int = 16_384  # request line and header section; a bearer token is under 1 KB
    max_header_count: int = 100
    max_trailer_bytes: int = 4_096  # nothing here reads trailers
    max_body_bytes: int = 1_048_576  # far above any uplink
    body_overrides: Mapping[str, int] = field(default_factory=dict)  # exact path -> bytes, such as imports
    max_buffered_body: int = 65_536  # an application that does not read makes the peer wait from here on
    max_chunk_overhead: int = 16_384  # chunk sizes and extensions, beyond eight bytes per byte of content
    max_pipelined: int = 64  # what one read can bring in honest use
    max_in_flight: int = 4_096  # complete requests being answered on all connections
    bodies_per_address: int = 256  # unfinished ones on anonymous connections; x max_buffered_body: 16 MiB
    header_timeout: float = 10.0  # from the first byte of a request, or from the handshake, to its empty line
    body_grace: float = 10.0  # the window over which the body's rate is judged
    min_body_rate: int = 64  # NB-IoT at its worst does a few hundred
    anonymous_body_timeout: float = 30.0  # for all of a body, seen every body_grace; a claim with a CSR has 3 KB
    keep_alive_timeout: float = 75.0
    anonymous_keep_alive: float = 10.0  # for the request that follows a claim or a refusal
    send_timeout: float = 60.0  # a peer that takes nothing of its answer for this long is cut
    anonymous_send_timeout: float = 15.0
    half_close_grace: float = 5.0  # to finish the answer for a peer that has stopped sending


class Bodies:
    """How many unfinished bodies the anonymous connections of each address have: an IPv4 address or an IPv6 /64."""

    __slots__ = ("_by_block", "_most")

    def __init__(self, most: int) -> None:
        self._by_block: dict[str, int] = {}
        self._most = most

    def enter(self, address: str) -> bool:
        """Take a place, which `leave` gives back; False if the address has none left."""
        block = address_block(address)
        held = self._by_block.get(block, 0)
        if held >= self._most:
            return False
        self._by_block[block] = held + 1
        return True

    def leave(self, address: str) -> None:
        """Give a place back."""
        block = address_block(address)
        left = self._by_block[block] - 1
        if left:
            self._by_block[block] = left
        else:
            del self._by_block[block]


class HttpCounters:
    """Plain counts since the server was made."""

    __slots__ = (
        "app_failures",
        "hot_requests",
        "idle_closed",
        "refused_bad_request",
        "refused_body_too_large",
        "refused_headers_too_large",
        "refused_other",
        "refused_overload",
        "refused_slow",
        "refused_target_too_long",
        "requests",
        "stalled",
        "upgraded",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.hot_requests = 0
        self.app_failures = 0
        self.idle_closed = 0
        self.stalled = 0
        self.upgraded = 0
        self.refused_bad_request = 0
        self.refused_slow = 0
        self.refused_body_too_large = 0
        self.refused_target_too_long = 0
        self.refused_headers_too_large = 0
        self.refused_overload = 0
        self.refused_other = 0

    def refused(self, status: int) -> None:
        """Count a request that was refused below the application with `status`."""
        match status:
            case 400:
                self.refused_bad_request += 1
            case 408:
                self.refused_slow += 1
            case 413:
                self.refused_body_too_large += 1
            case 414:
                self.refused_target_too_long += 1
            case 431:
                self.refused_headers_too_large += 1
            case 429 | 503:
                self.refused_overload += 1
            case _:
                self.refused_other += 1

    def as_dict(self) -> dict[str, int]:
        """All counts by name, for the metrics page."""
        return {name: getattr(self, name) for name in self.__slots__}
