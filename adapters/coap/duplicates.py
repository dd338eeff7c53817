"""Which message ids have been taken already, and what was answered (RFC 7252 §4.2, §4.5).

    first time ──► Entry, without reply ──► reply recorded ──► forgotten after EXCHANGE_LIFETIME / NON_LIFETIME
    again, with reply: the same bytes again        again, without: it is being worked on, or was a NON; nothing

One `Duplicates` serves all peers, because memory is one. It is two: that of devices, and a small one of strangers, all
those whose association is no device's, or not yet (`Table.known`). Neither takes from the other, so that nobody without
a credential can make us forget what a device sent. In each, whatever the bound, the peer that holds most pays, with the
oldest of its own entries (shares.py). Invariants: an entry is in its peer's table and in exactly one of the two ages,
or in neither; a table's bytes are the sum of what its entries cost, and charged to the memory that `known` says.

What can be lost: when memory is short, an entry goes before its time. A retransmission that comes later still is then
taken for a new request: it is answered again, and a request that is not idempotent acts twice, unless it has a message
id of its own (uplinks may). The bound for one device is far above what RFC 7252's NSTART lets it send in the 45 s in
which a CON is repeated, so that only peers that break it pay, and with their own entries. A stranger has little to ask
that is not idempotent, and its bound is some twenty answers of full size.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import msgspec

from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.shares import Share, Shares

ENTRY_COST: Final = 400
"""Bytes that an entry takes with a small reply, measured: tables, key, object, and the reply's own."""
SMALL_REPLY: Final = 16
"""Bytes of a reply that are in this already: an acknowledgement with a token and nothing to say."""


class Entry(msgspec.Struct, eq=False, gc=False):
    """One message id of one peer. Its cycle with the table ends when it is dropped, at the last by `forget`."""

    table: Table
    message_id: int
    expires: float
    reply: bytes | None = None
    repetitions: int = 0
    """How often the message came again after it was answered."""
    cost: int = ENTRY_COST


class Table(Share):
    """The entries of one peer, oldest first. `known`: it is a device's; written by `Duplicates.becomes_known`."""

    __slots__ = ("entries", "known")

    def __init__(self, known: bool = True) -> None:
        super().__init__()
        self.entries: OrderedDict[int, Entry] = OrderedDict()
        self.known = known


class Duplicates:
    """The memory of all peers."""

    __slots__ = ("_confirmable", "_counters", "_devices", "_limits", "_others", "_strangers")

    def __init__(self, limits: CoapLimits, counters: CoapCounters) -> None:
        self._limits = limits
        self._counters = counters
        self._confirmable: OrderedDict[Entry, None] = OrderedDict()
        self._others: OrderedDict[Entry, None] = OrderedDict()
        self._devices: Shares[Table] = Shares(limits.duplicate_bytes)
        self._strangers: Shares[Table] = Shares(limits.stranger_duplicate_bytes)

    def __len__(self) -> int:
        return len(self._confirmable) + len(self._others)

    @property
    def size(self) -> int:
        """Bytes that all entries cost."""
        return self._devices.bytes + self._strangers.bytes

    def find(self, table: Table, message_id: int, now: float) -> Entry | None:
        """The entry of a message that was taken before, if it still counts."""
        entry = table.entries.get(message_id)
        if entry is None:
            return None
        if entry.expires <= now:
            self._drop(entry)
            return None
        return entry

    def take(self, table: Table, message_id: int, confirmable: bool, now: float) -> Entry:
        """Remember a message id that `find` did not know."""
        limits = self._limits
        lifetime = limits.exchange_lifetime if confirmable else limits.non_lifetime
        entry = Entry(table, message_id, now + lifetime)
        table.entries[message_id] = entry
        (self._confirmable if confirmable else self._others)[entry] = None
        self._charge(table, ENTRY_COST)
        if len(table.entries) > limits.duplicates_per_peer:
            self._forget_oldest_of(table)
        return entry

    def record(self, entry: Entry, reply: bytes) -> None:
        """Keep what was answered, in place of what was recorded before."""
        entry.reply = reply
        cost = ENTRY_COST + max(0, len(reply) - SMALL_REPLY)
        extra = cost - entry.cost
        if not extra or entry.table.entries.get(entry.message_id) is not entry:
            return  # as before, or forgotten meanwhile
        entry.cost = cost
        self._charge(entry.table, extra)

    def becomes_known(self, table: Table) -> None:
        """A stranger has turned out to be a device: its entries are now of the devices' memory."""
        if not table.known:
            table.known = True
            self._strangers.hand_over(table, self._devices)
            self._charge(table, 0)

    def forget(self, table: Table) -> None:
        """Drop all of a peer that is gone."""
        for entry in list(table.entries.values()):
            self._drop(entry)

    def expire(self, now: float) -> None:
        """Drop what is too old. Cheap when there is nothing."""
        for age in (self._confirmable, self._others):
            while age:
                oldest = next(iter(age))
                if oldest.expires > now:
                    break
                self._drop(oldest)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do."""
        heads = [next(iter(age)).expires for age in (self._confirmable, self._others) if age]
        return min(heads, default=None)

    def _charge(self, table: Table, extra: int) -> None:
        limits = self._limits
        shares, most = (
            (self._devices, limits.duplicate_bytes_per_peer)
            if table.known
            else (self._strangers, limits.duplicate_bytes_per_stranger)
        )
        shares.charge(table, extra)
        while table.bytes > most and len(table.entries) > 1:
            self._forget_oldest_of(table)
        while shares.bytes > shares.limit and (greediest := shares.greediest()) is not None:
            self._forget_oldest_of(greediest)

    def _forget_oldest_of(self, table: Table) -> None:
        self._counters.duplicates_forgotten += 1
        self._drop(next(iter(table.entries.values())))

    def _drop(self, entry: Entry) -> None:
        table = entry.table
        del table.entries[entry.message_id]
        if entry in self._confirmable:
            del self._confirmable[entry]
        else:
            del self._others[entry]
        (self._devices if table.known else self._strangers).charge(table, -entry.cost)
