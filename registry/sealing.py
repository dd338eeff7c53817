"""Secrets that must be recoverable (PSKs, CA keys, issuer keys) are sealed under a key ring kept outside the database.

A sealed value is  version(1) ‖ key id length(1) ‖ key id ‖ nonce(12) ‖ AES-256-GCM ciphertext and tag.  Its
associated data names what the value is for and whose it is (purpose, owner, object, version): a row that is swapped
with another, a copied column or a flipped byte fails to open. The ring holds several keys by id; the active one seals,
all of them open, so the ring can be rotated without downtime: add a key, make it active, reseal, drop the old one
(trust.py does the resealing). A running node's ring follows its file: meeting a value that is sealed under a key it
does not know, or told by the feed, it reads the file again. Reading never makes it forget: a key that it has held stays
until the process ends, so that a half-copied file cannot lock a running node out.

Random 96-bit nonces are safe for 2**32 seals under one key (NIST SP 800-38D §8.3), far above what a ring key ever does.
"""

from __future__ import annotations

import base64
import fcntl
import hmac
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from registry import file_ownership
from registry.secrets import RandomBytes, Secret

log = logging.getLogger(__name__)

KEY_BYTES = 32
NONCE_BYTES = 12
_FORMAT = 1
_MAX_KEY_ID = 64


class SealBroken(Exception):
    """A sealed value does not open: another owner's, damaged, or sealed under a key that the ring does not have."""


class KeyRingError(Exception):
    """The key ring cannot be used; the message says which file and why."""


class SealContext(msgspec.Struct, frozen=True):
    """What a sealed value is bound to: moved anywhere else, it does not open."""

    purpose: str
    owner: str
    object_id: str
    version: int = 1

    def associated_data(self) -> bytes:
        """An unambiguous encoding: each part is preceded by its length."""
        parts = [part.encode() for part in (self.purpose, self.owner, self.object_id, str(self.version))]
        return b"gatehouse seal 1" + b"".join([len(part).to_bytes(4, "big") + part for part in parts])


class KeyRing:
    """The key-encryption keys by id, one of them active."""

    __slots__ = ("_active", "_ciphers", "_keys", "_random", "_read_again")

    def __init__(
        self,
        keys: Mapping[str, Secret[bytes]],
        active: str,
        random: RandomBytes = os.urandom,
        read_again: Callable[[], KeyRing | None] | None = None,
    ) -> None:
        """`read_again` answers what the ring's file holds, or None where it has not changed or cannot be read."""
        if active not in keys:
            raise KeyRingError(f"the active key {active!r} is not in the ring")
        for key_id, key in keys.items():
            if len(key.reveal()) != KEY_BYTES:
                raise KeyRingError(f"key {key_id!r} has {len(key.reveal())} bytes; a key has {KEY_BYTES}")
            if not 1 <= len(key_id.encode()) <= _MAX_KEY_ID:
                raise KeyRingError(f"a key id has 1 to {_MAX_KEY_ID} bytes")
        self._hold(keys, active)
        self._random = random
        self._read_again = read_again

    @classmethod
    def generate(cls, key_id: str = "k1", random: RandomBytes = os.urandom) -> KeyRing:
        """A ring with one new key."""
        return cls({key_id: Secret(random(KEY_BYTES))}, key_id, random)

    @property
    def active(self) -> str:
        """The id of the key that seals."""
        return self._active

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of all keys, in the order in which they were added."""
        return tuple(self._keys)

    def refresh(self) -> bool:
        """Take over what was added to the ring's file, and which key is active there; whether anything changed."""
        latest = self._read_again() if self._read_again is not None else None
        if latest is None:
            return False
        self._hold({**self._keys, **latest._keys}, latest._active)
        return True

    def seal(self, value: Secret[bytes], context: SealContext) -> bytes:
        """The value, readable again only with this ring and this context."""
        nonce, prefix = self._random(NONCE_BYTES), key_prefix(self._active)
        return prefix + nonce + self._ciphers[prefix].encrypt(nonce, value.reveal(), context.associated_data())

    def open(self, sealed: bytes, context: SealContext) -> Secret[bytes]:
        """The value that was sealed in this context. Raises SealBroken, always with the same few words."""
        if len(sealed) < 2 or sealed[0] != _FORMAT:
            raise SealBroken("not a sealed value")
        end = 2 + sealed[1]
        prefix = sealed[:end]
        cipher = self._ciphers.get(prefix)
        if cipher is None and self.refresh():
            cipher = self._ciphers.get(prefix)
        if cipher is None:
            raise SealBroken("sealed under a key that this ring does not have")
        nonce, box = sealed[end : end + NONCE_BYTES], sealed[end + NONCE_BYTES :]
        try:
            return Secret(cipher.decrypt(nonce, box, context.associated_data()))
        except (InvalidTag, ValueError):
            raise SealBroken("the sealed value is damaged or belongs elsewhere") from None

    def derivations(self, label: bytes, material: bytes) -> list[Secret[bytes]]:
        """32 bytes derived from `material` under each key of the ring, the active key's first.

        What is derived need not be stored: after a rotation of the ring it is still found among the later entries.
        """
        order = [self._active, *(k for k in self._keys if k != self._active)]
        message = len(label).to_bytes(4, "big") + label + material
        return [Secret(hmac.digest(self._keys[k].reveal(), message, "sha256")) for k in order]

    def with_new(self, key_id: str) -> KeyRing:
        """This ring and one more key, which opens but does not seal yet. Raises KeyRingError."""
        if key_id in self._keys:
            raise KeyRingError(f"the ring already has a key {key_id!r}")
        return KeyRing({**self._keys, key_id: Secret(self._random(KEY_BYTES))}, self._active, self._random)

    def with_active(self, key_id: str) -> KeyRing:
        """This ring, another of its keys the active one. Raises KeyRingError."""
        return KeyRing(self._keys, key_id, self._random)

    def with_new_active(self, key_id: str) -> KeyRing:
        """This ring and one more key, which is the active one. Raises KeyRingError."""
        return self.with_new(key_id).with_active(key_id)

    def without(self, key_id: str) -> KeyRing:
        """This ring without a key that is not the active one. Raises KeyRingError."""
        if key_id not in self._keys:
            raise KeyRingError(f"the ring has no key {key_id!r}")
        return KeyRing({i: k for i, k in self._keys.items() if i != key_id}, self._active, self._random)

    def _hold(self, keys: Mapping[str, Secret[bytes]], active: str) -> None:
        self._keys = MappingProxyType(dict(keys))
        self._active = active
        # By what values under the key begin with. Made once: to make one takes longer than to open a value with it.
        self._ciphers = {key_prefix(key_id): AESGCM(key.reveal()) for key_id, key in keys.items()}

    def to_json(self) -> Secret[str]:
        """The file's content."""
        keys = {key_id: base64.b64encode(key.reveal()).decode() for key_id, key in self._keys.items()}
        return Secret(json.dumps({"active": self._active, "keys": keys}, indent=2) + "\n")

    @classmethod
    def from_json(
        cls, text: str, random: RandomBytes = os.urandom, read_again: Callable[[], KeyRing | None] | None = None
    ) -> KeyRing:
        """The ring of a file's content. Raises KeyRingError without quoting the content."""
        try:
            document = json.loads(text)
            keys = {str(i): Secret(base64.b64decode(k, validate=True)) for i, k in document["keys"].items()}
            active = str(document["active"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise KeyRingError('not a key ring: {"active": ID, "keys": {ID: base64 of 32 bytes}} is expected') from None
        return cls(keys, active, random, read_again)


def key_prefix(key_id: str) -> bytes:
    """How every value begins that is sealed under this key."""
    return bytes((_FORMAT, len(key_id.encode()))) + key_id.encode()


def load_or_create(path: Path) -> KeyRing:
    """The ring at `path`; at the first start it is made, readable by its owner only. Raises KeyRingError.

    Two starters at once end with one ring: the file is linked into place complete, and the loser reads the winner's.
    """
    if not path.exists():
        _create(path)
    return _load(path, _Watched(path).read_again)


class _Watched:
    """A ring's file, read again only when it is another one than before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._look()

    def read_again(self) -> KeyRing | None:
        stamp = self._look()
        if stamp is None or stamp == self._stamp:
            return None
        try:
            ring = _load(self._path)
        except KeyRingError as error:
            log.warning("key_ring.unreadable", extra={"fields": {"reason": str(error)}})
            return None
        self._stamp = stamp
        log.info("key_ring.reloaded", extra={"fields": {"active": ring.active}})
        return ring

    def _look(self) -> tuple[int, int, int] | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_ino, state.st_size


def _load(path: Path, read_again: Callable[[], KeyRing | None] | None = None) -> KeyRing:
    try:
        mode = path.stat().st_mode
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KeyRingError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not text'}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyRingError(f"{path}: its mode is {stat.S_IMODE(mode):04o}; only its owner may read it (chmod 600)")
    try:
        return KeyRing.from_json(text, read_again=read_again)
    except KeyRingError as error:
        raise KeyRingError(f"{path}: {error}") from None


@contextmanager
def changing(path: Path) -> Iterator[KeyRing]:
    """The ring that is in the file now, to be saved over it inside the block; who else changes it waits.

    A ring that was read before may lack a key that somebody else has added meanwhile; saved, it would take that key
    away from what is sealed under it. Raises KeyRingError.
    """
    try:
        descriptor = _hold(path)
    except OSError as error:
        raise KeyRingError(f"{path}: {error.strerror}") from None
    try:
        yield _load(path)
    finally:
        os.close(descriptor)


def save(ring: KeyRing, path: Path) -> None:
    """Write the ring over the one at `path`, all or nothing."""
    file_ownership.folder(path.parent)
    temporary = _write_beside(ring, path)
    os.replace(temporary, path)
    _sync(path.parent)


def _hold(path: Path) -> int:
    """A descriptor of the file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)  # NFS locks what is writable
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was replaced while we waited


def _create(path: Path) -> None:
    try:
        file_ownership.folder(path.parent)
        temporary = _write_beside(KeyRing.generate(), path)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        _sync(path.parent)
    except OSError as error:
        raise KeyRingError(f"{path}: cannot be made: {error.strerror}") from None


def _write_beside(ring: KeyRing, path: Path) -> Path:
    temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.new")
    temporary.unlink(missing_ok=True)
    descriptor = file_ownership.new_file(temporary, os.O_WRONLY)
    with os.fdopen(descriptor, "w") as file:
        file.write(ring.to_json().reveal())
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
