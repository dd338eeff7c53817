"""What root writes among another user's files is that user's.

A command that root runs beside a service user's node must leave nothing behind that the node cannot open: a lock, a
log, a key ring. So what is made here belongs to the owner of the folder that it is made in. Only what has just been
made is given away, through its descriptor: a name that was there before may be a hard link to somebody else's file.
"""

from __future__ import annotations

import os
from pathlib import Path


def new_file(path: Path, flags: int) -> int:
    """A descriptor of a file that was not there, mode 0600. Raises FileExistsError, OSError."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    _give(descriptor, path.parent)
    return descriptor


def file(path: Path, flags: int) -> int:
    """The same, or a descriptor of the file that is there, which keeps its owner. Raises OSError."""
    try:
        return new_file(path, flags)
    except FileExistsError:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def folder(path: Path) -> None:
    """Make a folder with mode 0700, and those above it, unless it is there. Raises OSError."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        folder(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _give(descriptor, path.parent)
    finally:
        os.close(descriptor)


def _give(descriptor: int, parent: Path) -> None:
    owner = parent.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
