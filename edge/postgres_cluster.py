"""The cluster on disk: made whole or not at all, and its password.

    D/secrets/postgres-password   0600, written durably before the cluster that is made with it
    D/postgres.new-*/             a cluster being made: {password, data/}; swept away at the next start
    D/postgres/                   0700; appears by one durable rename of a complete, synced `data`

What can be lost: nothing that was acknowledged, since no client can connect before the rename. A kill at any point
leaves either no D/postgres, and the next start makes one with the same password, or a whole one.

When root runs PostgreSQL as an `Account`, the directories belong to that account but the directories above them may
be closed to it. PostgreSQL is then given `/proc/self/fd/N` of an inherited descriptor instead of the path: resolving
that link does not walk the parents (proc(5)), and every backend inherits the descriptor. `Doorway` hides the
difference. Elsewhere than on Linux the account must be able to walk there.
"""

import os
import pwd
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge.postgres_binaries import Account, PostgresBinaries, PostgresUnavailable
from edge.postgres_process import BoundedLog, ChildProcess
from registry import file_ownership

SUPERUSER = "gatehouse"
INITDB_SECONDS = 300.0  # it takes one; a slow SD card takes some tens
UNFINISHED = "postgres.new-"


@dataclass(frozen=True, slots=True)
class Doorway:
    """How a child reaches one directory: the path to give it, and the descriptors it must inherit for that."""

    path: str
    descriptors: tuple[int, ...]


@contextmanager
def doorway(directory: Path, account: Account | None) -> Iterator[Doorway]:
    """A way into `directory` for a child that runs as `account`, valid for children spawned inside the `with`."""
    if account is None or sys.platform != "linux":
        yield Doorway(str(directory), ())
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Doorway(f"/proc/self/fd/{descriptor}", (descriptor,))
    finally:
        os.close(descriptor)


def cluster_major(cluster: Path) -> int | None:
    """The major version of the cluster, None if there is none. Raises PostgresUnavailable if it is not a cluster."""
    try:
        text = (cluster / "PG_VERSION").read_text("ascii", "replace").strip()
    except FileNotFoundError:
        if cluster.is_dir() and any(cluster.iterdir()):
            raise PostgresUnavailable(f"{cluster} is not empty and not a PostgreSQL cluster") from None
        return None
    except OSError as error:
        raise PostgresUnavailable(f"cannot read the cluster in {cluster}: {error.strerror}") from error
    if not text.isdecimal():
        raise PostgresUnavailable(f"{cluster}/PG_VERSION does not hold a version")
    return int(text)


def cluster_account(cluster: Path, account: Account | None) -> Account | None:
    """Who must run an existing cluster: the user who owns its files, whatever account a new one would get.

    Raises PostgresUnavailable if that is somebody we cannot become.
    """
    try:
        status = cluster.stat()
    except FileNotFoundError:
        return account
    if status.st_uid == os.geteuid():
        return None if os.geteuid() != 0 else account
    if account is None:
        raise PostgresUnavailable(
            f"{cluster} belongs to user {status.st_uid}, and we are user {os.geteuid()}; run as that user or as root"
        )
    if status.st_uid == account.uid:
        return account
    return Account(str(status.st_uid), status.st_uid, status.st_gid)


def owner_account(data_dir: Path) -> Account | None:
    """Who should run a new cluster when root makes it in somebody else's directory: that user, if it has a name."""
    status = data_dir.stat()
    if os.geteuid() != 0 or status.st_uid == 0:
        return None
    try:
        return Account(pwd.getpwuid(status.st_uid).pw_name, status.st_uid, status.st_gid)
    except KeyError:  # initdb wants a name
        return None


def password(data_dir: Path, *, cluster_exists: bool) -> str:
    """The superuser's password, made at the first start. Raises PostgresUnavailable if a cluster has lost its own."""
    path = data_dir / "secrets" / "postgres-password"
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise PostgresUnavailable(f"cannot read {path}: {error.strerror}") from error
    if cluster_exists:
        raise PostgresUnavailable(f"{path} is missing; restore it, the database cannot be opened without it")
    file_ownership.folder(path.parent)
    fresh = secrets.token_urlsafe(32)
    write_durably(path, fresh + "\n")
    return fresh


def write_durably(path: Path, text: str) -> None:
    """Put `text` at `path`, 0600, whole or not at all, surviving a power cut."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = file_ownership.new_file(beside, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_unfinished(data_dir: Path) -> None:
    """Remove what an interrupted `make_cluster` left; if its last process still writes there, the next start does."""
    for leftover in data_dir.glob(UNFINISHED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


async def make_cluster(
    data_dir: Path, binaries: PostgresBinaries, account: Account | None, secret: str, *, fsync: bool
) -> None:
    """Make D/postgres: SCRAM everywhere, UTF-8, C collation (the same order on every C library), checksums.

    Raises PostgresUnavailable with what initdb said.
    """
    workshop = data_dir / f"{UNFINISHED}{secrets.token_hex(4)}"
    workshop.mkdir(mode=0o700)
    try:
        password_file = workshop / "password"
        descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret)
        if account is not None:
            os.chown(password_file, account.uid, account.gid)
            os.chown(workshop, account.uid, account.gid)
        log = BoundedLog(data_dir / "postgres.log")
        with doorway(workshop, account) as door:
            child = await ChildProcess.spawn(
                [
                    str(binaries.initdb),
                    f"--pgdata={door.path}/data",
                    f"--pwfile={door.path}/password",
                    f"--username={SUPERUSER}",
                    "--auth-local=scram-sha-256",
                    "--auth-host=scram-sha-256",
                    "--encoding=UTF8",
                    "--locale=C",
                    "--data-checksums",
                    "--no-instructions",
                    *([] if fsync else ["--no-sync"]),
                ],
                log=log,
                account=account,
                descriptors=door.descriptors,
                death_signal=signal.SIGKILL,
            )
        try:
            status = await child.exited(within=INITDB_SECONDS)
        finally:
            child.send(signal.SIGKILL)
        await child.drained(within=1.0)
        if status != 0:
            raise PostgresUnavailable(f"initdb of PostgreSQL {binaries.version} failed:\n{log.tail()}")
        (workshop / "data").rename(data_dir / "postgres")
        sync_directory(data_dir)
    except TimeoutError as error:
        raise PostgresUnavailable(f"initdb did not finish within {INITDB_SECONDS:.0f} s") from error
    except OSError as error:
        raise PostgresUnavailable(f"cannot make a cluster in {data_dir}: {error}") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
