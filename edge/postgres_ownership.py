"""Who may run the PostgreSQL of a data directory: one owner, and commands attached beside it.

Two files carry advisory locks (flock(2)); locks vanish with the process that holds them, whatever killed it:

    owner.lock      exclusive, held by the owner from before the first look at the cluster until after its stop.
                    Its text, `{"pid", "role"}`, is only for messages: it outlives a killed owner.
    attached.lock   shared, one per attached command; exclusive by a temporary owner (role `command`) before it stops.
    postgres.json   where the running server listens (no secret); there only while it is ready.

    attach:  lock attached.lock shared ─▶ read postgres.json ─▶ connect
    leave:   remove postgres.json ─▶ lock attached.lock exclusive (waits for every attached) ─▶ stop

In that order no command can be left with a server that stops under it: either it read the file while holding its shared
lock, and the owner waits; or the file is gone, and it tries to become the owner itself. A `serve` does not wait for
commands when it is told to stop.
"""

import asyncio
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from registry import file_ownership

Role = Literal["serve", "command"]

OWNER_FILE = "owner.lock"
ATTACHED_FILE = "attached.lock"
POLL = 0.05  # seconds between two tries for a lock: nothing tells when a flock becomes free without blocking a thread
STABLE = 0.25  # seconds the text of owner.lock must stay the same to be believed: its holder writes it after locking
LOCK_TEXT_BYTES = 256  # more than any text we write


class DataDirectoryBusy(Exception):
    """Another process owns the data directory; `pid` and `role` say which (pid 0: it has not said yet)."""

    def __init__(self, data_dir: Path, holder: "Holder") -> None:
        who = f"process {holder.pid} (gatehouse {holder.role})" if holder.pid else "a process that does not tell its id"
        super().__init__(f"the data directory {data_dir} is in use by {who}")
        self.data_dir = data_dir
        self.pid = holder.pid
        self.role = holder.role


@dataclass(frozen=True, slots=True)
class Holder:
    """What owner.lock says about its holder. A killed holder's text stays until the next one writes."""

    pid: int
    role: str


class FileLock:
    """One flock on one open file. Not inherited by children: descriptors of Python close on exec."""

    def __init__(self, path: Path) -> None:
        self._descriptor = file_ownership.file(path, os.O_RDWR)

    def take(self, *, shared: bool = False) -> bool:
        """Try once, without blocking."""
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def inscribe(self, holder: Holder) -> None:
        text = json.dumps({"pid": holder.pid, "role": holder.role}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def inscription(self) -> Holder:
        try:
            said = json.loads(os.pread(self._descriptor, LOCK_TEXT_BYTES, 0))
            return Holder(int(said["pid"]), str(said["role"]))
        except (ValueError, KeyError, TypeError):
            return Holder(0, "unknown")

    def close(self) -> None:
        """Release, and forget the file. The file stays: removing a lock file would let two owners in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


async def own(data_dir: Path, role: Role, *, patience: float) -> FileLock:
    """Become the owner of `data_dir`, which must exist; its text then says so.

    Raises DataDirectoryBusy: at once if a `serve` is in the way, after `patience` seconds for a `command`.
    """
    lock = FileLock(data_dir / OWNER_FILE)
    loop = asyncio.get_running_loop()
    now = loop.time()
    deadline, holder, since = now + patience, lock.inscription(), now
    try:
        while not lock.take():
            now = loop.time()
            if (seen := lock.inscription()) != holder:
                holder, since = seen, now
            settled = now - since >= STABLE
            if (settled and holder.role == "serve") or now >= max(deadline, since + STABLE):
                raise DataDirectoryBusy(data_dir, holder)
            await asyncio.sleep(POLL)
        lock.inscribe(Holder(os.getpid(), role))
    except BaseException:
        lock.close()
        raise
    return lock


def try_own(data_dir: Path, role: Role) -> FileLock | None:
    """Become the owner if nobody is."""
    lock = FileLock(data_dir / OWNER_FILE)
    if not lock.take():
        lock.close()
        return None
    lock.inscribe(Holder(os.getpid(), role))
    return lock


def current_holder(data_dir: Path) -> Holder:
    """Who last wrote owner.lock."""
    lock = FileLock(data_dir / OWNER_FILE)
    try:
        return lock.inscription()
    finally:
        lock.close()


@contextmanager
def attached(data_dir: Path) -> Iterator[bool]:
    """Hold attached.lock shared; False if an owner is stopping."""
    lock = FileLock(data_dir / ATTACHED_FILE)
    try:
        yield lock.take(shared=True)
    finally:
        lock.close()


async def nobody_attached(data_dir: Path) -> FileLock:
    """Wait, without bound, until no command is attached. Close the lock only after the server has stopped."""
    lock = FileLock(data_dir / ATTACHED_FILE)
    try:
        while not lock.take():  # noqa: ASYNC110 - another process cannot set our Event
            await asyncio.sleep(POLL)
    except BaseException:
        lock.close()
        raise
    return lock
