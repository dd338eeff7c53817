"""The embedded PostgreSQL: one server per data directory, as our child, brought back when it dies.

    stopped ──start──▶ starting ──a real connection succeeds──▶ ready ──stop──▶ stopped
                          ▲                                       │
                          └──────── back-off ◀── crashed ◀────────┘ the process ended and nobody asked it to

Invariants
- Who runs PostgreSQL in D holds D/owner.lock, from before the first look at the cluster until after the stop
  (`edge.postgres_ownership`). Nobody else starts, evicts or cleans anything there.
- PostgreSQL does not outlive us: stop() ends it, and when we are killed the kernel tells it (`edge.postgres_child`). It
  may still be on its way out when the next owner comes, who waits for it (`edge.postgres_process.evict_residents`).
- It listens on a Unix socket only, in a directory that only its user may enter, and wants a password (SCRAM) there too.
- The DSN is the same for the life of this object, crashes included: same socket path, same password.

What can race: a crash with stop() (the supervisor is cancelled first, then whatever child there is gets stopped); a
restart with backends orphaned by a killed postmaster (they are waited for, else PostgreSQL refuses the directory).
What can be lost: with fsync on nothing committed; connections and running transactions in a crash; log lines still in
the pipe when we are killed.

Files in D: owner.lock, attached.lock, postgres.json, postgres.log[.1], postgres/, postgres-socket, secrets/,
and, if root runs the wheel's programs from a place closed to others, postgres-programs/.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self
from urllib.parse import quote

import asyncpg

from edge.postgres_binaries import (
    Account,
    PostgresBinaries,
    PostgresUnavailable,
    all_binaries,
    choose_account,
    find_binaries,
    reachable,
)
from edge.postgres_cluster import (
    SUPERUSER,
    cluster_account,
    cluster_major,
    doorway,
    make_cluster,
    owner_account,
    password,
    sweep_unfinished,
    write_durably,
)
from edge.postgres_ownership import (
    POLL,
    DataDirectoryBusy,
    FileLock,
    Role,
    attached,
    current_holder,
    nobody_attached,
    own,
    try_own,
)
from edge.postgres_process import BoundedLog, ChildProcess, evict_residents, residents

__all__ = [
    "DataDirectoryBusy",
    "EmbeddedPostgres",
    "PostgresBinaries",
    "PostgresHandle",
    "PostgresUnavailable",
    "all_binaries",
    "attach_or_start",
    "find_binaries",
]

logger = logging.getLogger(__name__)

DATABASE = "gatehouse"
PORT = 5432  # names the socket file only
SOCKET_PATH_BYTES = 103  # sun_path holds 107 bytes on Linux and 103 on macOS (unix(7), sys/un.h)
# What both asyncpg's host list and PostgreSQL's directory list take as one plain path.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+=-]+")
SOCKET_PREFIX = "gatehouse-"

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "listen_addresses": "",  # no TCP: the socket directory's mode is the first lock, the password the second
        "port": str(PORT),
        "unix_socket_permissions": "0700",
        "shared_buffers": "128MB",  # an edge box has other work; the kernel's cache does the rest
        "max_connections": "100",  # our pool, commands beside it, and an operator's psql
        "wal_compression": "on",  # full-page images of small updates are most of an edge box's writes
        "synchronous_commit": "on",  # an acknowledgement means stored
        "jit": "off",  # short queries; compiling them costs more than it saves
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_destination": "stderr",
        "logging_collector": "off",  # we read standard error and bound its file ourselves
        "restart_after_crash": "on",  # a killed backend is PostgreSQL's own to heal
    }
)
# For tests: a power cut would lose the cluster.
WITHOUT_FSYNC: Mapping[str, str] = MappingProxyType(
    {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
)

SERVE_PATIENCE = 30.0  # seconds a starting `serve` gives a command that owns the directory
ATTACH_SECONDS = 60.0  # how long a command waits for an owner that is starting or stopping; initdb on an SD card fits
START_SECONDS = 300.0  # replaying much WAL on slow storage takes minutes
LEFTOVER_SECONDS = 8.0  # a killed owner's server is gone in well under one; PostgreSQL itself gives up after 5
CONNECT_SECONDS = 10.0
READY_POLL = 0.02
# No socket yet, starting up, or just ending; InternalClientError is how asyncpg may tell of a connection lost midway.
NOT_NOW = (OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, asyncpg.InternalClientError)
STOP_STEPS = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 8.0), (signal.SIGKILL, 5.0))  # fast, immediate, none
BACK_OFF = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # seconds before each try; the last one repeats
STEADY_SECONDS = 60.0  # a server that lived this long starts the back-off anew


class EmbeddedPostgres:
    """PostgreSQL on `data_dir`; `async with` starts and stops it.

    `owner` says what we are to others who want the directory; a `serve` waits `patience` seconds for a command that has
    it. `binaries` overrides the search (which reads `environ`, by default the process's). `run_as` names the user when
    we are root. `settings` go over SETTINGS. `fsync=False` is for tests. `start_seconds` bounds one start, recovery
    included.

    While the server is down after a crash, `crashed` is set and `ready` is not; it is tried again for ever. `restarts`
    counts the returns.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        owner: Role,
        binaries: PostgresBinaries | None = None,
        fsync: bool = True,
        run_as: str | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
        environ: Mapping[str, str] | None = None,
        patience: float = SERVE_PATIENCE,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._data_dir = data_dir.absolute()
        self._cluster = self._data_dir / "postgres"
        self._owner: Role = owner
        self._chosen = binaries
        self._fsync = fsync
        self._run_as = run_as
        self._settings = {**SETTINGS, **({} if fsync else WITHOUT_FSYNC), **settings}
        self._environ = os.environ if environ is None else environ
        self._patience = patience
        self._start_seconds = start_seconds
        self._log = BoundedLog(self._data_dir / "postgres.log")
        self._lock: FileLock | None = None
        self._running: _Running | None = None
        self._child: ChildProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.crashed = asyncio.Event()
        self.restarts = 0

    @property
    def dsn(self) -> str:
        """A URL for asyncpg.connect(dsn=…), with the password; never log it. Raises RuntimeError before start()."""
        return self._started().dsn(DATABASE)

    @property
    def binaries(self) -> PostgresBinaries:
        """The programs in use. Raises RuntimeError before start()."""
        return self._started().binaries

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        return self._child.pid if self._child is not None and self._child.running else None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, lock: FileLock | None = None) -> None:
        """Own the directory, make the cluster if there is none, and return when a connection has succeeded.

        `lock` is the owner lock if the caller already holds it; it is released by stop() or a failure here.
        Raises DataDirectoryBusy, or PostgresUnavailable with PostgreSQL's last lines; nothing is left running then.
        """
        if self._lock is not None:
            raise RuntimeError("already started")
        self._lock = lock
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock or await own(self._data_dir, self._owner, patience=self._patience)
            await self._open()
        except OSError as error:
            await self._shut_down()
            raise PostgresUnavailable(f"cannot use the data directory {self._data_dir}: {error}") from error
        except BaseException:
            await self._shut_down()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="postgres-supervisor")

    async def stop(self) -> None:
        """Stop PostgreSQL and give the directory up; does nothing if not started.

        A command that owns the directory first waits for every command attached to it. The rest usually takes some
        tens of milliseconds and is bounded by STOP_STEPS.
        """
        if self._lock is None:
            return
        gate: FileLock | None = None
        self._announcement.unlink(missing_ok=True)
        try:
            if self._owner == "command":
                gate = await nobody_attached(self._data_dir)
        finally:
            try:
                await self._shut_down()
            finally:
                if gate is not None:
                    gate.close()

    @property
    def _announcement(self) -> Path:
        return self._data_dir / "postgres.json"

    def _started(self) -> "_Running":
        if self._running is None:
            raise RuntimeError("PostgreSQL is not started")
        return self._running

    async def _open(self) -> None:
        self._announcement.unlink(missing_ok=True)
        sweep_unfinished(self._data_dir)
        major = cluster_major(self._cluster)
        account = choose_account(self._run_as)
        if major is not None:
            account = cluster_account(self._cluster, account)
        elif self._run_as is None:
            account = owner_account(self._data_dir) or account
        binaries = await self._find(major)
        programs = await asyncio.to_thread(reachable, binaries, account, self._data_dir)
        secret = password(self._data_dir, cluster_exists=major is not None)
        if major is None:
            await make_cluster(self._data_dir, programs, account, secret, fsync=self._fsync)
        sockets = _make_socket_directory(self._data_dir, account)
        self._running = _Running(programs, account, sockets, secret)
        await self._launch()
        holder = {"pid": os.getpid(), "socket_directory": str(sockets)}
        write_durably(self._announcement, json.dumps(holder))
        fields = {"pid": self.pid, "version": programs.version, "origin": programs.origin}
        logger.info("postgres.started", extra={"fields": fields})

    async def _find(self, major: int | None) -> PostgresBinaries:
        if self._chosen is None:
            return await asyncio.to_thread(find_binaries, cluster_major=major, environ=self._environ)
        if major not in (None, self._chosen.major):
            raise PostgresUnavailable(
                f"the cluster in {self._cluster} is of PostgreSQL {major}, "
                f"but the programs in {self._chosen.bindir} are PostgreSQL {self._chosen.version}"
            )
        return self._chosen

    async def _launch(self) -> None:
        running = self._started()
        await self._end_child()
        if not await evict_residents(self._cluster, patience=LEFTOVER_SECONDS):
            raise PostgresUnavailable(f"an earlier PostgreSQL in {self._cluster} cannot be stopped")
        _forget_recycled_pid(self._cluster)
        for leftover in running.sockets.glob(".s.PGSQL.*"):
            leftover.unlink(missing_ok=True)
        self._log.start_anew()
        with (
            doorway(self._cluster, running.account) as data,
            doorway(running.sockets, running.account) as sockets,
        ):
            settings = {**self._settings, "unix_socket_directories": sockets.path}
            options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
            self._child = await ChildProcess.spawn(
                [str(running.binaries.postgres), "-D", data.path, *options],
                log=self._log,
                account=running.account,
                descriptors=(*data.descriptors, *sockets.descriptors),
            )
        await self._until_ready(self._child, running)
        self.crashed.clear()
        self.ready.set()

    async def _until_ready(self, child: ChildProcess, running: "_Running") -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_seconds
        while loop.time() < deadline:
            if not child.running:
                await child.drained(within=1.0)
                raise PostgresUnavailable(
                    f"PostgreSQL {running.binaries.version} did not start ({_ending(await child.exited())}):\n"
                    f"{self._log.tail()}"
                )
            try:
                await _prove(running)
                return
            except asyncpg.InvalidPasswordError as error:
                raise PostgresUnavailable(
                    f"PostgreSQL does not take the password in {self._data_dir}/secrets/postgres-password"
                ) from error
            except NOT_NOW:
                await asyncio.sleep(READY_POLL)
        raise PostgresUnavailable(f"PostgreSQL was not ready after {self._start_seconds:.0f} s:\n{self._log.tail()}")

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            assert self._child is not None
            child, since = self._child, loop.time()
            status = await child.exited()
            down = loop.time()
            self.ready.clear()
            self.crashed.set()
            logger.error("postgres.exited", extra={"fields": {"pid": child.pid, "reason": _ending(status)}})
            tries = 0 if down - since > STEADY_SECONDS else tries
            while not self.ready.is_set():
                await asyncio.sleep(BACK_OFF[min(tries, len(BACK_OFF) - 1)])
                tries += 1
                try:
                    await self._launch()
                except Exception as error:  # the supervisor lives as long as the server does
                    logger.error("postgres.restart_failed", extra={"fields": {"try": tries, "reason": str(error)}})
            self.restarts += 1
            fields = {"pid": self.pid, "after_ms": round((loop.time() - down) * 1000)}
            logger.warning("postgres.restarted", extra={"fields": fields})

    async def _end_child(self) -> None:
        child = self._child
        if child is None:
            return
        try:
            for number, seconds in STOP_STEPS:
                if not child.running:
                    break
                child.send(number)
                try:
                    await child.exited(within=seconds)
                except TimeoutError:
                    logger.warning("postgres.stop_slow", extra={"fields": {"pid": child.pid, "signal": number.name}})
            await child.drained(within=1.0)
        finally:
            child.send(signal.SIGQUIT)  # only if we were cancelled: it must not stay
        self._child = None

    async def _shut_down(self) -> None:
        try:
            if self._supervisor is not None:
                self._supervisor.cancel()
                await asyncio.wait([self._supervisor])
                self._supervisor = None
            await self._end_child()
            if self._running is not None:  # backends may survive a killed postmaster for a moment
                await evict_residents(self._cluster, patience=LEFTOVER_SECONDS)
        finally:
            self.ready.clear()
            self.crashed.clear()
            if self._running is not None:
                _remove_socket_directory(self._data_dir)
                self._running = None
            if self._lock is not None:
                self._lock.close()
                self._lock = None


@dataclass(frozen=True, slots=True)
class PostgresHandle:
    """A database to work with inside `async with`: `owned` tells whether we run it or it was there."""

    dsn: str
    owned: bool

    def __repr__(self) -> str:
        return f"PostgresHandle(owned={self.owned})"  # the DSN holds the password


@asynccontextmanager
async def attach_or_start(
    data_dir: Path,
    *,
    owner: Role = "command",
    binaries: PostgresBinaries | None = None,
    fsync: bool = True,
    run_as: str | None = None,
    environ: Mapping[str, str] | None = None,
    patience: float = ATTACH_SECONDS,
) -> AsyncIterator[PostgresHandle]:
    """Use the PostgreSQL of `data_dir` for one command: the running one if there is one, else our own until the end.

    The arguments but `patience` matter only in the second case. Raises DataDirectoryBusy if an owner is neither ready
    nor gone within `patience` seconds, and PostgresUnavailable.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    while (lock := _try_own(data_dir, owner)) is None:
        with attached(data_dir) as granted:
            if granted and (dsn := await _running_dsn(data_dir)) is not None:
                yield PostgresHandle(dsn, owned=False)
                return
        if loop.time() >= deadline:
            raise DataDirectoryBusy(data_dir, current_holder(data_dir))
        await asyncio.sleep(POLL)
    embedded = EmbeddedPostgres(data_dir, owner=owner, binaries=binaries, fsync=fsync, run_as=run_as, environ=environ)
    await embedded.start(lock)
    try:
        yield PostgresHandle(embedded.dsn, owned=True)
    finally:
        await embedded.stop()


@dataclass(frozen=True, slots=True)
class _Running:
    binaries: PostgresBinaries
    account: Account | None
    sockets: Path
    secret: str

    def dsn(self, database: str) -> str:
        return _dsn(self.sockets, self.secret, database)

    def __repr__(self) -> str:
        return f"_Running({self.binaries!r})"


def _dsn(sockets: Path, secret: str, database: str) -> str:
    return f"postgresql://{SUPERUSER}:{quote(secret)}@/{database}?host={quote(str(sockets))}&port={PORT}"


async def _prove(running: _Running) -> None:
    try:
        connection = await asyncpg.connect(dsn=running.dsn(DATABASE), timeout=CONNECT_SECONDS)
    except asyncpg.InvalidCatalogNameError:
        await _make_database(running)
        return
    await connection.close(timeout=CONNECT_SECONDS)


async def _make_database(running: _Running) -> None:
    connection = await asyncpg.connect(dsn=running.dsn("postgres"), timeout=CONNECT_SECONDS)
    try:
        # A failing statement's message may quote what a peer sent. The client has the error; the log does not need it.
        await connection.execute(f"ALTER ROLE {SUPERUSER} SET log_min_messages = log")
        await connection.execute(f"CREATE DATABASE {DATABASE}")
    finally:
        await connection.close(timeout=CONNECT_SECONDS)


def _try_own(data_dir: Path, owner: Role) -> FileLock | None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return try_own(data_dir, owner)
    except PermissionError as error:
        message = f"{error.filename} is closed to user {os.geteuid()}; run as the server's user"
        raise PostgresUnavailable(message) from error
    except OSError as error:
        raise PostgresUnavailable(f"cannot use the data directory {data_dir}: {error}") from error


async def _running_dsn(data_dir: Path) -> str | None:
    try:
        announced = json.loads((data_dir / "postgres.json").read_text())
        if announced["pid"] != current_holder(data_dir).pid:
            return None  # a killed owner's; the present one is not ready
        dsn = _dsn(Path(announced["socket_directory"]), password(data_dir, cluster_exists=True), DATABASE)
        connection = await asyncpg.connect(dsn=dsn, timeout=CONNECT_SECONDS)
    except asyncpg.InvalidPasswordError as error:
        raise PostgresUnavailable(f"the PostgreSQL of {data_dir} does not take the password in its secrets") from error
    except (*NOT_NOW, ValueError, KeyError):
        return None
    await connection.close(timeout=CONNECT_SECONDS)
    return dsn


def _forget_recycled_pid(cluster: Path) -> None:
    """Remove postmaster.pid if the id in it is alive but, as no PostgreSQL lives in the cluster, somebody else's.

    PostgreSQL would take that process for itself and refuse to start. With a dead id it clears the file on its own.
    """
    if not os.path.isdir("/proc/self/fd"):
        return  # we cannot see who lives where, so we must not judge
    path = cluster / "postmaster.pid"
    try:
        pid = abs(int(path.read_text("ascii").split("\n", 1)[0]))
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, ValueError, OverflowError):
        return
    if not residents(cluster):
        path.unlink(missing_ok=True)


def _make_socket_directory(data_dir: Path, account: Account | None) -> Path:
    """A fresh private directory that fits in a socket address; D/postgres-socket is it, or links to it."""
    _remove_socket_directory(data_dir)
    place = data_dir / "postgres-socket"
    if _fits(place):
        place.mkdir(mode=0o700)
        directory = place
    else:
        directory = Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX, dir=_short_place()))
        place.symlink_to(directory)
    if account is not None:
        os.chown(directory, account.uid, account.gid)
    return directory


def _remove_socket_directory(data_dir: Path) -> None:
    place = data_dir / "postgres-socket"
    if place.is_symlink():
        target = Path(os.readlink(place))
        # Somebody else's directory may have taken the name since; ours is 0700 and was empty but for sockets.
        if target.name.startswith(SOCKET_PREFIX) and target.is_dir() and stat.S_IMODE(target.lstat().st_mode) == 0o700:
            for leftover in target.glob(".s.PGSQL.*"):
                leftover.unlink(missing_ok=True)
            try:
                target.rmdir()
            except OSError:
                logger.warning("postgres.socket_directory_left", extra={"fields": {"path": str(target)}})
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)


def _short_place() -> Path:
    for place in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):  # noqa: S108 - mkdtemp makes it private
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK) and _fits(place / f"{SOCKET_PREFIX}12345678"):
            return place
    raise PostgresUnavailable("found no temporary directory whose path is short enough for a Unix socket")


def _fits(directory: Path) -> bool:
    socket = f"{directory}/.s.PGSQL.{PORT}"
    return PLAIN_PATH.fullmatch(str(directory)) is not None and len(os.fsencode(socket)) <= SOCKET_PATH_BYTES


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
