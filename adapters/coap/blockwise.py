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
the order of their end. Each has two memories, as duplicates.py has: that of devices, and a small one of strangers, all
those whose association is no device's, or not yet. Neither takes from the other.

Where all of the devices' memory is taken, an upload that would begin is refused (5.03: come back), and one that goes on
takes the place of the one that has begun last (whose next block is then a gap), or is refused if it is that one. If any
could displace any other, many that begin at once would all go on in vain; if none could, all would wait for each other.
As it is the oldest always gets to its end, and then the next one.
Among strangers a refusal would let some keep all others out for as long as they like. So there the oldest upload of who
holds most gives way to who will hold no more than half of that, and its next block is a gap: a CSR gets in beside any
number of large bodies. Snapshots go in both, the oldest of the peer that holds most: a GET can be asked again, and is
when its snapshot is gone; the ETag tells the client if the state has changed between (RFC 7959 §2.4).
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
from adapters.coap.shares import Share, Shares

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


class _Uploader(Share):
    """A peer's uploads, oldest first. `known`: it is a device."""

    __slots__ = ("known", "uploads")

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.known = known
        self.uploads: dict[Key, _Upload] = {}


class Uploads:
    """Bodies that are not whole yet, of all peers."""

    __slots__ = ("_begun", "_devices", "_limits", "_of_peer", "_strangers", "_uploads")

    def __init__(self, limits: CoapLimits) -> None:
        self._limits = limits
        self._uploads: OrderedDict[Key, _Upload] = OrderedDict()  # in the order of their last use
        self._begun: dict[Key, None] = {}  # those of devices, in the order in which they began
        self._of_peer: dict[PeerKey, _Uploader] = {}
        self._devices: Shares[_Uploader] = Shares(limits.upload_bytes)
        self._strangers: Shares[_Uploader] = Shares(limits.stranger_upload_bytes)

    def __len__(self) -> int:
        return len(self._uploads)

    @property
    def size(self) -> int:
        """Bytes that all uploads take."""
        return self._devices.bytes + self._strangers.bytes

    def take(
        self,
        key: Key,
        block: Block,
        size1: int | None,
        content_format: int | None,
        payload: bytes,
        now: float,
        known: bool = True,
    ) -> Partial | Complete | Refusal:
        """Add a block; `known` says whether its peer is a device. After any refusal the upload is gone, except that
        NO_ROOM keeps what there was."""
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
            return self._begin(key, content_format, payload, now, known)
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
        uploader = self._of_peer[key.peer]
        if not self._room(uploader, key, len(payload)):
            return Refusal.NO_ROOM
        upload.body += payload
        self._shares(uploader).charge(uploader, len(payload))
        self._touch(key, upload, now)
        return Partial()

    def becomes_known(self, peer: PeerKey) -> None:
        """A stranger has turned out to be a device: what it has begun is now of the devices' memory."""
        uploader = self._of_peer.get(peer)
        if uploader is None or uploader.known:
            return
        uploader.known = True
        self._begun.update(dict.fromkeys(uploader.uploads))
        self._strangers.hand_over(uploader, self._devices)
        if self._devices.bytes > self._devices.limit:
            self.forget(peer)

    def forget(self, peer: PeerKey) -> None:
        """Drop all of a peer that is gone."""
        uploader = self._of_peer.get(peer)
        for key in list(uploader.uploads) if uploader is not None else ():
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

    def _begin(
        self, key: Key, content_format: int | None, payload: bytes, now: float, known: bool
    ) -> Partial | Refusal:
        uploader = self._of_peer.get(key.peer) or _Uploader(known)
        while len(uploader.uploads) >= self._limits.uploads_per_peer:
            self._drop(next(iter(uploader.uploads)))  # its own oldest
        if not self._room(uploader, key, _COST + len(payload)):
            return Refusal.NO_ROOM
        upload = _Upload(content_format, now + self._limits.upload_timeout)
        upload.body += payload
        self._uploads[key] = uploader.uploads[key] = upload
        if uploader.known:
            self._begun[key] = None
        self._of_peer[key.peer] = uploader
        self._shares(uploader).charge(uploader, _COST + len(payload))
        return Partial()

    def _shares(self, uploader: _Uploader) -> Shares[_Uploader]:
        return self._devices if uploader.known else self._strangers

    def _room(self, uploader: _Uploader, key: Key, extra: int) -> bool:
        """Whether `key` may take more; others of its peer, younger ones of devices, or a stranger's who has much more
        than it, make room."""
        limits, shares = self._limits, self._shares(uploader)
        most = limits.upload_bytes_per_peer if uploader.known else limits.body_bytes + _COST
        while uploader.bytes + extra > most:
            oldest = next((other for other in uploader.uploads if other != key), None)
            if oldest is None:
                return False
            self._drop(oldest)
        while shares.bytes + extra > shares.limit:
            gives_way = self._youngest(key) if uploader.known else self._greediest(uploader.bytes + extra)
            if gives_way is None:
                return False
            self._drop(gives_way)
        return True

    def _youngest(self, key: Key) -> Key | None:
        """The devices' upload that began last; None for `key` itself, and for one that has not begun."""
        youngest = next(reversed(self._begun), None)
        return None if youngest == key or key not in self._begun else youngest

    def _greediest(self, wanted: int) -> Key | None:
        """The oldest upload of the stranger who holds most, if that is at least twice what another one will hold."""
        greediest = self._strangers.greediest()
        return None if greediest is None or greediest.bytes < 2 * wanted else next(iter(greediest.uploads))

    def _touch(self, key: Key, upload: _Upload, now: float) -> None:
        upload.expires = now + self._limits.upload_timeout
        self._uploads.move_to_end(key)

    def _drop(self, key: Key) -> None:
        upload = self._uploads.pop(key, None)
        if upload is None:
            return
        self._begun.pop(key, None)
        uploader = self._of_peer[key.peer]
        del uploader.uploads[key]
        if not uploader.uploads:
            del self._of_peer[key.peer]
        self._shares(uploader).charge(uploader, -_COST - len(upload.body))


def _again(upload: _Upload, block: Block, payload: bytes) -> bool:
    """Whether this is the block that was taken last, sent again under a new message id by a client that missed 2.31."""
    end = block.start + len(payload)
    return block.more and end == len(upload.body) and upload.body[block.start :] == payload


class _Snapshot:
    __slots__ = ("expires", "response")

    def __init__(self, response: Response, expires: float) -> None:
        self.response = response
        self.expires = expires


class _Fetcher(Share):
    """What a peer's snapshots cost, in the order of their last use. `known`: it is a device."""

    __slots__ = ("costs", "known")

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.known = known
        self.costs: OrderedDict[Key, int] = OrderedDict()


class Snapshots:
    """Answers that are being fetched in blocks, of all peers."""

    __slots__ = ("_counters", "_devices", "_limits", "_of_peer", "_snapshots", "_strangers")

    def __init__(self, limits: CoapLimits, counters: CoapCounters) -> None:
        self._limits = limits
        self._counters = counters
        self._snapshots: OrderedDict[Key, _Snapshot] = OrderedDict()
        self._of_peer: dict[PeerKey, _Fetcher] = {}
        self._devices: Shares[_Fetcher] = Shares(limits.snapshot_bytes)
        self._strangers: Shares[_Fetcher] = Shares(limits.stranger_snapshot_bytes)

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def size(self) -> int:
        """Bytes that all snapshots take."""
        return self._devices.bytes + self._strangers.bytes

    def keep(self, key: Key, response: Response, now: float, known: bool = True) -> None:
        """Keep an answer, in place of an earlier one; older ones make room. `known`: its peer is a device."""
        limits = self._limits
        self._drop(key)
        cost = _COST + len(response.payload)
        fetcher = self._of_peer.get(key.peer) or _Fetcher(known)
        shares = self._shares(fetcher)
        most = limits.snapshot_bytes_per_peer if fetcher.known else limits.snapshot_bytes_per_stranger
        if cost > min(most, shares.limit):
            return  # the handler is asked for each block, then
        self._of_peer[key.peer] = fetcher
        self._snapshots[key] = _Snapshot(response, now + limits.snapshot_timeout)
        fetcher.costs[key] = cost
        shares.charge(fetcher, cost)
        while fetcher.bytes > most:
            self._forget(next(iter(fetcher.costs)))
        self._make_room(shares)

    def becomes_known(self, peer: PeerKey) -> None:
        """A stranger has turned out to be a device: what it fetches is now of the devices' memory."""
        fetcher = self._of_peer.get(peer)
        if fetcher is not None and not fetcher.known:
            fetcher.known = True
            self._strangers.hand_over(fetcher, self._devices)
            self._make_room(self._devices)

    def get(self, key: Key, now: float) -> Response | None:
        """The answer that is being fetched, if it is still there."""
        self.expire(now)
        snapshot = self._snapshots.get(key)
        if snapshot is None:
            return None
        snapshot.expires = now + self._limits.snapshot_timeout
        self._snapshots.move_to_end(key)
        self._of_peer[key.peer].costs.move_to_end(key)
        return snapshot.response

    def forget(self, peer: PeerKey) -> None:
        """Drop all of a peer that is gone."""
        fetcher = self._of_peer.get(peer)
        for key in list(fetcher.costs) if fetcher is not None else ():
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

    def _shares(self, fetcher: _Fetcher) -> Shares[_Fetcher]:
        return self._devices if fetcher.known else self._strangers

    def _make_room(self, shares: Shares[_Fetcher]) -> None:
        while shares.bytes > shares.limit and (greediest := shares.greediest()) is not None:
            self._forget(next(iter(greediest.costs)))

    def _forget(self, key: Key) -> None:
        self._counters.snapshots_forgotten += 1
        self._drop(key)

    def _drop(self, key: Key) -> None:
        if self._snapshots.pop(key, None) is None:
            return
        fetcher = self._of_peer[key.peer]
        self._shares(fetcher).charge(fetcher, -fetcher.costs.pop(key))
        if not fetcher.costs:
            del self._of_peer[key.peer]


def entity_tag(payload: bytes) -> bytes:
    """The ETag of a body that has none from its resource: the same for the same bytes, so that blocks match."""
    return sha256(payload).digest()[:_ETAG_BYTES]
