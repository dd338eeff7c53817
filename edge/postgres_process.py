"""A PostgreSQL program as our child process, and the processes that still live in a cluster's directory.

    spawn ─▶ running ─▶ exited(status)          one keeper thread per child forks it, waits for it, and ends with it

Why a thread: the death signal that ties the child to us fires when the thread that forked it ends (prctl(2)).
The loop's thread, or a pool's, may end earlier than the process; the keeper lives exactly as long as the child. It is
a daemon thread, so a dying interpreter does not wait for it, and the child then dies of the signal.

What PostgreSQL writes goes through a pipe into a `BoundedLog`. A second thread reads the pipe to its end, which comes
when the last process that inherited it is gone, and that may be later than `exited`. On our own sudden death the lines
still in the pipe are lost; PostgreSQL ignores the broken pipe.

Residents: every process of a cluster has the cluster's directory as its working directory, which a recycled process
id does not have. They are signalled through pidfds opened before the directory is compared, so no signal can reach a
stranger. Without /proc (not Linux) there are none to see, and PostgreSQL's own interlock (postmaster.pid and the
shared memory block) is the only guard.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeVar

from edge.postgres_binaries import Account, PostgresUnavailable
from registry import file_ownership

Guard = Literal["prctl", "watch"]
Told = TypeVar("Told")
GUARD: Guard = "prctl" if sys.platform == "linux" else "watch"

LAUNCHER = Path(__file__).with_name("postgres_child.py")
# Complete and constant: nothing of our own environment (which may hold secrets, or PG* settings) reaches PostgreSQL.
ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C", "TZ": "UTC"}
LOG_BYTES = 4 << 20  # days of an ordinary server's lines; one older file of the same size is kept
LINE_BYTES = 16 << 10  # a longer line is cut where it is read
TAIL_LINES = 20  # enough to hold PostgreSQL's error with its detail and hint
QUIT_SECONDS = 6.0  # told to stop at once, a postmaster gives its backends 5 s and then kills them itself
KILL_SECONDS = 5.0  # for the kernel to take the processes apart
RESIDENT_POLL = 0.03  # seconds


class BoundedLog:
    """A file of at most LOG_BYTES, one older file beside it, and the last lines in memory.

    Takes lines from any thread. A disk that cannot take them costs the lines, never the server.
    """

    def __init__(self, path: Path, *, limit: int = LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def write(self, line: bytes) -> None:
        with self._lock:
            self._tail.append(line.decode("utf-8", "replace").rstrip())
            try:
                self._append(line)
            except OSError:
                return

    def start_anew(self) -> None:
        """Forget the remembered lines, so that the next failure shows only its own."""
        with self._lock:
            self._tail.clear()

    def tail(self) -> str:
        with self._lock:
            return "\n".join(self._tail)

    def _append(self, line: bytes) -> None:
        descriptor = file_ownership.file(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            full = os.fstat(descriptor).st_size + len(line) > self._limit
            if not full:
                os.write(descriptor, line)
        finally:
            os.close(descriptor)
        if full:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._append(line[: self._limit])


class ChildProcess:
    """A program that dies with us. Made by `spawn`; its keeper reaps it, so it never stays a zombie."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._started: asyncio.Future[int] = loop.create_future()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._drained: asyncio.Future[None] = loop.create_future()
        self._lock = threading.Lock()
        self._reaped = False

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        *,
        log: BoundedLog,
        account: Account | None = None,
        descriptors: Sequence[int] = (),
        death_signal: signal.Signals = signal.SIGQUIT,
        guard: Guard = GUARD,
    ) -> "ChildProcess":
        """Run `command` (a full path first) as `account`, with `descriptors` inherited under the same numbers.

        Raises PostgresUnavailable if not even the launcher can be started. A program that the launcher cannot run
        shows as an exit with status 127 and a line in the log.
        """
        child = cls(asyncio.get_running_loop())
        who = f"{account.uid}:{account.gid}" if account else "-"
        launch = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(int(death_signal)), guard, who]
        keeper = threading.Thread(
            target=child._keep,
            args=([*launch, *command], tuple(descriptors), log, guard),
            name="postgres-keeper",
            daemon=True,
        )
        keeper.start()
        try:
            # Descriptors belong to the caller, who may close them as soon as this returns: wait even when cancelled.
            await asyncio.shield(child._started)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                await child._started
                child.send(signal.SIGKILL)
            raise
        except OSError as error:
            raise PostgresUnavailable(f"cannot start {command[0]}: {error}") from error
        return child

    @property
    def pid(self) -> int:
        return self._started.result()

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def exited(self, *, within: float | None = None) -> int:
        """Wait for the end, at most `within` seconds; the exit status, or minus the signal. Raises TimeoutError."""
        async with asyncio.timeout(within):  # Python 3.11's wait_for may swallow a cancellation
            return await asyncio.shield(self._ended)

    async def drained(self, *, within: float) -> None:
        """Wait until everything the child wrote is in the log, at most `within` seconds."""
        await asyncio.wait([self._drained], timeout=within)

    def send(self, number: signal.Signals) -> None:
        """Signal the child; nothing happens if it has ended."""
        with self._lock:
            if not self._reaped:
                os.kill(self.pid, number)

    def _keep(self, command: list[str], descriptors: tuple[int, ...], log: BoundedLog, guard: Guard) -> None:
        try:
            process = subprocess.Popen(  # noqa: S603 - our own launcher
                command,
                # The watcher takes the end of this pipe for the end of us; with prctl nothing is sent.
                stdin=subprocess.PIPE if guard == "watch" else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                env=ENVIRONMENT,
                start_new_session=True,  # Ctrl-C in a terminal is ours to handle, not PostgreSQL's
            )
        except OSError as error:
            self._tell(self._started.set_exception, error)
            return
        assert process.stdout is not None
        threading.Thread(target=self._drain, args=(process.stdout, log), name="postgres-log", daemon=True).start()
        self._tell(self._started.set_result, process.pid)
        if hasattr(os, "waitid"):
            # Learn of the end without reaping, so that `send` can never signal a recycled id.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                status = process.wait()
                self._reaped = True
        else:
            status = process.wait()
            self._reaped = True
        if process.stdin is not None:
            process.stdin.close()
        self._tell(self._ended.set_result, status)

    def _drain(self, pipe: IO[bytes], log: BoundedLog) -> None:
        with pipe:
            while line := pipe.readline(LINE_BYTES):
                log.write(line)
        self._tell(self._drained.set_result, None)

    def _tell(self, settle: Callable[[Told], object], value: Told) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(settle, value)


@dataclass(frozen=True, slots=True)
class Resident:
    """A live PostgreSQL process whose working directory is the cluster's."""

    pid: int


def residents(cluster: Path) -> list[Resident]:
    """The PostgreSQL processes that live in `cluster`, whoever started them. Blocks for some milliseconds."""
    return [Resident(pid) for pid in _process_ids() if _lives_in(pid, cluster)]


async def evict_residents(cluster: Path, *, patience: float) -> bool:
    """Wait until no PostgreSQL lives in `cluster`; after `patience` seconds tell it to stop, later kill it.

    Call it only while holding the directory's owner lock. False if some process outlives even that.
    """
    loop = asyncio.get_running_loop()
    for number, seconds in ((None, patience), (signal.SIGQUIT, QUIT_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        deadline = loop.time() + seconds
        remaining = await asyncio.to_thread(residents, cluster)
        if number is not None:
            for resident in remaining:
                _signal_resident(resident, cluster, number)
        while remaining and loop.time() < deadline:
            await asyncio.sleep(RESIDENT_POLL)
            remaining = await asyncio.to_thread(residents, cluster)
        if not remaining:
            return True
    return False


def _process_ids() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    yield from (int(name) for name in names if name.isascii() and name.isdigit())


def _lives_in(pid: int, cluster: Path) -> bool:
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe")).removesuffix(" (deleted)")
        return program in ("postgres", "postmaster") and os.path.samefile(f"/proc/{pid}/cwd", cluster)
    except OSError:  # gone, or not ours to look at
        return False


def _signal_resident(resident: Resident, cluster: Path, number: signal.Signals) -> None:
    if sys.platform != "linux":
        return
    try:
        descriptor = os.pidfd_open(resident.pid)
    except OSError:
        return
    try:
        if _lives_in(resident.pid, cluster):
            signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return
    finally:
        os.close(descriptor)
