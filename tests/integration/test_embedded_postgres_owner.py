"""What root's commands leave in a service user's data directory: nothing that the service could not open."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import asyncpg
import pytest

from edge.postgres import PostgresBinaries, all_binaries, attach_or_start
from registry import file_ownership
from registry.sealing import load_or_create, save

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can write for others")
SERVICE = next((entry for entry in pwd.getpwall() if entry.pw_uid not in (0, 65534)), None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory of the service user's."""
    assert SERVICE is not None
    place = tmp_path / "D"
    place.mkdir(mode=0o700)
    os.chown(place, SERVICE.pw_uid, SERVICE.pw_gid)
    return place


def owners(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.lstat().st_uid for path in (place, *place.rglob("*"))}


async def test_a_command_of_roots_leaves_the_services_files(place: Path) -> None:
    assert SERVICE is not None
    binaries: PostgresBinaries = all_binaries(os.environ)[0]
    for _ in range(2):
        async with attach_or_start(place, binaries=binaries, fsync=False) as handle:
            connection = await asyncpg.connect(handle.dsn)
            await connection.close()
            async with attach_or_start(place, binaries=binaries, fsync=False) as beside:
                assert not beside.owned
    ring = load_or_create(place / "secrets" / "key-ring.json")
    save(ring, place / "secrets" / "key-ring.json")
    found = owners(place)
    assert {"owner.lock", "attached.lock", "postgres.log", "secrets/postgres-password", "postgres/base"} <= found.keys()
    others = {path: uid for path, uid in found.items() if uid != SERVICE.pw_uid}
    assert {path for path in others if not path.startswith("postgres-programs")} == set()


def test_what_was_there_keeps_its_owner(place: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("root's")
    os.link(precious, place / "attached.lock")
    os.close(file_ownership.file(place / "attached.lock", os.O_RDWR))
    assert precious.stat().st_uid == 0
    (place / "owner.lock").symlink_to(precious)
    with pytest.raises(OSError):  # noqa: PT011  # the reason is the kernel's
        file_ownership.file(place / "owner.lock", os.O_RDWR)
