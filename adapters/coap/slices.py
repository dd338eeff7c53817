"""Large answers to one peer, block by block (RFC 7959 Block2): how large a block is, and which bodies are under way.

    cut ─► all of a body, or its block and the options that say so; from the first block on the body is kept
           (blockwise.py), and counts as being fetched until its last block, or until that is waited for no more

A path that is narrower than `room` loses what is large, every time. So what was sent twice and did not arrive is cut
anew, for datagrams of `narrow_room`, and so is everything for this peer from then on.
"""

from __future__ import annotations

from adapters.coap.blockwise import Key, entity_tag
from adapters.coap.duplicates import Table
from adapters.coap.memory import Memory
from adapters.coap.options import BLOCK2, ETAG, SIZE2, Block, encode_uint, response_options
from adapters.coap.ports import Response


class Slices:
    """Those of one peer. `room` is the largest datagram that may be sent to it, in bytes."""

    __slots__ = ("_fetches", "_limits", "_memory", "_narrow", "_table", "room")

    def __init__(self, memory: Memory, table: Table, room: int) -> None:
        self.room = room
        self._limits = memory.limits
        self._memory = memory
        self._table = table
        self._fetches: dict[Key, float] = {}  # until when the next block of a body is waited for
        self._narrow = False

    def cut(
        self,
        key: Key,
        token: bytes,
        response: Response,
        wanted: Block | None,
        options: list[tuple[int, bytes]],
        now: float,
        exponent: int = 6,
    ) -> bytes | None:
        """The part of a response that goes into this message, its options added to `options`; None beyond the end."""
        body = response.payload
        options += response_options(response)
        if not body:
            return body
        exponent = min(exponent, self._limits.block_exponent)
        if not response.code.is_successful():
            wanted = None  # an error is the answer to any block
        if wanted is not None:
            exponent = min(exponent, wanted.exponent)
        overhead = 4 + len(token) + sum(len(value) + 3 for _, value in options) + 20  # Block2, Size2, ETag, marker
        room = min(self.room, self._limits.narrow_room) if self._narrow else self.room
        while exponent > 0 and (16 << exponent) + overhead > room:
            exponent -= 1
        size = 16 << exponent
        start = wanted.start if wanted is not None else 0
        if start == 0 and len(body) <= size:
            if wanted is not None:
                options.append((BLOCK2, Block(0, False, exponent).encode()))
            return body
        if start >= len(body):
            return None
        if response.etag is None and response.code.is_successful():
            options.append((ETAG, entity_tag(body)))
        end = start + size
        if start == 0:
            self._memory.snapshots.keep(key, response, now, self._table.known)
            options.append((SIZE2, encode_uint(len(body))))
        self._is_fetching(key, start, end < len(body), now)
        options.append((BLOCK2, Block(start // size, end < len(body), exponent).encode()))
        return body[start:end]

    def fetched_until(self, key: Key) -> float:
        """Until when a newer body of this name has to wait for the blocks of the one before; 0 where it need not."""
        return self._fetches.get(key, 0.0)

    def do_not_arrive(self, datagram: bytes, repetitions: int) -> bool:
        """Whether that may be for their size: this was sent twice already, and a smaller one can be made."""
        return repetitions >= 2 and len(datagram) > self._limits.narrow_room

    def narrowed(self) -> None:
        """Cut for a narrow path from now on."""
        if not self._narrow:
            self._narrow = True
            self._memory.counters.narrowed += 1

    def forget(self) -> None:
        """The peer is gone."""
        self._fetches.clear()

    def _is_fetching(self, key: Key, start: int, more: bool, now: float) -> None:
        """A block of a body goes out: its next one will be asked for, or it was the last."""
        known = self._fetches.pop(key, None) is not None
        if not more or not (known or start == 0):
            return
        self._fetches[key] = now + self._limits.fetch_patience
        if len(self._fetches) > self._limits.fetches_per_peer:
            del self._fetches[next(iter(self._fetches))]
