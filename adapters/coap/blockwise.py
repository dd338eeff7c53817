"""Bodies that come and go in blocks (RFC 7959): uploads that are put together, answers that are cut.

    Block1 0, more ──► Upload ──► next block at its end ──► … ──► last block: the whole body, once
                          ├── a gap, another format, nothing there: 4.08        ├── block 0 again: from the start
                          ├── more than `body_bytes`, or Size1 says so: 4.13 with Size1
                          └── no new block for `upload_timeout`: dropped; what comes then is a gap

    a large answer ──► Snapshot ──► block, block, … ──► dropped `snapshot_timeout` after the last one asked for

Both are kept by peer and `Key`: method, path, query, and for uploads the Request-Tag (RFC 9175 §3). So two uploads of
one peer to one resource without tags are one: the later block 0 begins it anew, and the blocks of the earlier one are
gaps from then on (RFC 7959 §2.5). A body becomes a request only when it is whole.

One `Uploads` and one `Snapshots` serve all peers. Both are in the order of their last use, which with one timeout is
the order of their end. Uploads never push each other out beyond their own peer: where all memory is taken, a newcomer
is told to come back (5.03). Snapshots do, oldest first: a GET can be asked again, and is when its snapshot is gone; the
ETag tells the client if the state has changed between (RFC 7959 §2.4).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import sha256
from typing import Final

import msgspec
from aiocoap.numbers.codes import Code

from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.options import Block, RequestOptions
from adapters.coap.ports import Response

_COST: Final = 600
"""Bytes that an upload or a snapshot takes beside its body."""

_ETAG_BYTES: Final = 6

PeerKey = int
"""Whose it is; unique among the living peers."""


class Key(msgspec.Struct, frozen=True, gc=False):
    """What a body belongs to, at one peer."""

    peer: PeerKey
    method: Code
    path: tuple[str, ...]
    query: tuple[str, ...]
    accept: int | None
    request_tag: tuple[bytes, ...]


def upload_key(peer: PeerKey, method: Code, options: RequestOptions) -> Key:
    """Whose body a Block1 is part of."""
    return Key(peer, method, options.path, options.query, None, options.request_tag)


def answer_key(peer: PeerKey, method: Code, options: RequestOptions) -> Key:
    """Which answer a Block2 is part of. Later requests for blocks have no body, and need no tag (§3.3)."""
    return Key(peer, method, options.path, options.query, options.accept, ())


class Refusal(Enum):
    """Why a block was not taken."""

    INCOMPLETE = auto()  # 4.08
    MISFIT = auto()  # 4.00: more to come, and not a whole block
    TOO_LARGE = auto()  # 4.13
    NO_ROOM = auto()  # 5.03


@dataclass(frozen=True, slots=True)
class Partial:
    """The block was taken; more are to come."""


@dataclass(frozen=True, slots=True)
class Complete:
    """The block was the last one."""

    body: bytes


class _Upload:
    __slots__ = ("body", "content_format", "expires")

    def __init__(self, content_format: int | None, expires: float) -> None:
        self.body = bytearray()
        self.content_format = content_format
        self.expires = expires


class Uploads:
    """Bodies that are not whole yet, of all peers."""

    __slots__ = ("_limits", "_of_peer", "_uploads", "bytes")

    def __init__(self, limits: CoapLimits) -> None:
        self._limits = limits
        self._uploads: OrderedDict[Key, _Upload] = OrderedDict()
        self._of_peer: dict[PeerKey, dict[Key, _Upload]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._uploads)

    def take(
        self, key: Key, block: Block, size1: int | None, content_format: int | None, payload: bytes, now: float
    ) -> Partial | Complete | Refusal:
        """Add a block. After any refusal the upload is gone, except that NO_ROOM keeps what there was."""
        limits = self._limits
        self.expire(now)
        upload = self._uploads.get(key)
        if block.more and len(payload) != block.size:
            self._drop(key)
            return Refusal.MISFIT  # RFC 7959 §2.2, §2.3
        if len(payload) > block.size:
            self._drop(key)
            return Refusal.MISFIT
        if (size1 or 0) > limits.body_bytes or block.start + len(payload) > limits.body_bytes:
            self._drop(key)
            return Refusal.TOO_LARGE
        if block.number == 0:
            self._drop(key)  # from the start, whatever there was
            if not block.more:
                return Complete(payload)
            upload = None
        elif upload is None or upload.content_format != content_format:
            self._drop(key)
            return Refusal.INCOMPLETE  # RFC 7959 §2.9.2
        if upload is None:
            return self._begin(key, content_format, payload, now)
        if _again(upload, block, payload):
            self._touch(key, upload, now)
            return Partial()
        if block.start != len(upload.body):
            self._drop(key)
            return Refusal.INCOMPLETE
        if not block.more:
            body = bytes(upload.body) + payload
            self._drop(key)
            return Complete(body)
        if not self._room(key, len(payload)):
            return Refusal.NO_ROOM
        upload.body += payload
        self.bytes += len(payload)
        self._touch(key, upload, now)
        return Partial()

    def forget(self, peer: PeerKey) -> None:
        """Drop all of a peer that is gone."""
        for key in list(self._of_peer.get(peer, ())):
            self._drop(key)

    def expire(self, now: float) -> None:
        """Drop what no block was added to for too long."""
        while self._uploads:
            key = next(iter(self._uploads))
            if self._uploads[key].expires > now:
                return
            self._drop(key)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do."""
        return next(iter(self._uploads.values())).expires if self._uploads else None

    def _begin(self, key: Key, content_format: int | None, payload: bytes, now: float) -> Partial | Refusal:
        mine = self._of_peer.get(key.peer, {})
        while len(mine) >= self._limits.uploads_per_peer:
            self._drop(next(iter(mine)))  # its own oldest
        if not self._room(key, _COST + len(payload)):
            return Refusal.NO_ROOM
        upload = _Upload(content_format, now + self._limits.upload_timeout)
        upload.body += payload
        self._uploads[key] = upload
        self._of_peer.setdefault(key.peer, {})[key] = upload
        self.bytes += _COST + len(payload)
        return Partial()

    def _room(self, key: Key, extra: int) -> bool:
        mine = self._of_peer.get(key.peer, {})
        while sum(_COST + len(upload.body) for upload in mine.values()) + extra > self._limits.upload_bytes_per_peer:
            others = [other for other in mine if other != key]
            if not others:
                return False
            self._drop(others[0])
        return self.bytes + extra <= self._limits.upload_bytes

    def _touch(self, key: Key, upload: _Upload, now: float) -> None:
        upload.expires = now + self._limits.upload_timeout
        self._uploads.move_to_end(key)

    def _drop(self, key: Key) -> None:
        upload = self._uploads.pop(key, None)
        if upload is None:
            return
        mine = self._of_peer[key.peer]
        del mine[key]
        if not mine:
            del self._of_peer[key.peer]
        self.bytes -= _COST + len(upload.body)


def _again(upload: _Upload, block: Block, payload: bytes) -> bool:
    """Whether this is the block that was taken last, sent again under a new message id by a client that missed 2.31."""
    end = block.start + len(payload)
    return block.more and end == len(upload.body) and upload.body[block.start :] == payload


class _Snapshot:
    __slots__ = ("expires", "response")

    def __init__(self, response: Response, expires: float) -> None:
        self.response = response
        self.expires = expires


class Snapshots:
    """Answers that are being fetched in blocks, of all peers."""

    __slots__ = ("_counters", "_limits", "_of_peer", "_snapshots", "bytes")

    def __init__(self, limits: CoapLimits, counters: CoapCounters) -> None:
        self._limits = limits
        self._counters = counters
        self._snapshots: OrderedDict[Key, _Snapshot] = OrderedDict()
        self._of_peer: dict[PeerKey, OrderedDict[Key, int]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._snapshots)

    def keep(self, key: Key, response: Response, now: float) -> None:
        """Keep an answer, in place of an earlier one; older ones make room."""
        limits = self._limits
        self._drop(key)
        cost = _COST + len(response.payload)
        if cost > min(limits.snapshot_bytes_per_peer, limits.snapshot_bytes):
            return  # the handler is asked for each block, then
        mine = self._of_peer.setdefault(key.peer, OrderedDict())
        self._snapshots[key] = _Snapshot(response, now + limits.snapshot_timeout)
        mine[key] = cost
        self.bytes += cost
        while sum(mine.values()) > limits.snapshot_bytes_per_peer:
            self._forget(next(iter(mine)))
        while self.bytes > limits.snapshot_bytes:
            self._forget(next(iter(self._snapshots)))

    def get(self, key: Key, now: float) -> Response | None:
        """The answer that is being fetched, if it is still there."""
        self.expire(now)
        snapshot = self._snapshots.get(key)
        if snapshot is None:
            return None
        snapshot.expires = now + self._limits.snapshot_timeout
        self._snapshots.move_to_end(key)
        return snapshot.response

    def forget(self, peer: PeerKey) -> None:
        """Drop all of a peer that is gone."""
        for key in list(self._of_peer.get(peer, ())):
            self._drop(key)

    def expire(self, now: float) -> None:
        """Drop what nobody asked for for too long."""
        while self._snapshots:
            key = next(iter(self._snapshots))
            if self._snapshots[key].expires > now:
                return
            self._drop(key)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do."""
        return next(iter(self._snapshots.values())).expires if self._snapshots else None

    def _forget(self, key: Key) -> None:
        self._counters.snapshots_forgotten += 1
        self._drop(key)

    def _drop(self, key: Key) -> None:
        if self._snapshots.pop(key, None) is None:
            return
        mine = self._of_peer[key.peer]
        self.bytes -= mine.pop(key)
        if not mine:
            del self._of_peer[key.peer]


def entity_tag(payload: bytes) -> bytes:
    """The ETag of a body that has none from its resource: the same for the same bytes, so that blocks match."""
    return sha256(payload).digest()[:_ETAG_BYTES]
