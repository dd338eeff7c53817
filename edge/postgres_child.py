"""The launcher: becomes a PostgreSQL program that cannot outlive its parent.

Run as a script by path (`python -I -S postgres_child.py PARENT SIGNAL GUARD ACCOUNT PROGRAM ARGUMENT…`), never
imported by the server, so it stands on the standard library alone. SIGNAL is the number to receive when the parent
dies; GUARD is `prctl` (Linux) or `watch`; ACCOUNT is `uid:gid`, or `-` to stay who we are.

    start ─ import everything ─ drop privileges ─ ask for the death signal ─ is the parent still ours? ─ exec
                                                          │ (guard `watch`)
                                                          └ leave a watcher behind that waits for a pipe to close

The order is the theory:
- everything is imported first, because the interpreter may lie where the dropped user cannot read;
- privileges go before the death signal is asked for: changing credentials clears it (prctl(2), PR_SET_PDEATHSIG);
- the parent is compared after asking: one that died in between would never be reported.
The death signal survives exec, so PostgreSQL itself is the direct child. It is sent when the *thread* that forked ends;
`edge.postgres_process` therefore forks from a thread that lives as long as the child.

The watcher, detached by a double fork, holds two pipes: standard input, whose other end only the parent
has, and one whose other end only PostgreSQL and its backends have. The first to close tells who died. The watcher is a
weaker guard: it can be killed by itself, and a stopped machine may see it late.
"""

import ctypes
import os
import select
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCH_FAILED = 127  # what shells answer for a program that cannot be run


def main(arguments: list[str]) -> NoReturn:
    parent, death_signal = int(arguments[0]), int(arguments[1])
    guard, account, program = arguments[2], arguments[3], arguments[4]
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl if guard == "prctl" else None
        os.umask(0o077)
        if account != "-":
            _become(*(int(number) for number in account.split(":")))
        if prctl is None:
            _leave_watcher(death_signal)
        elif prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
        if os.getppid() != parent:
            sys.exit(LAUNCH_FAILED)
        _forget_standard_input()
        os.chdir("/")
        os.execv(program, arguments[4:])  # noqa: S606 - no shell is wanted
    except OSError as error:
        sys.stderr.write(f"cannot run {program}: {error}\n")
        sys.exit(LAUNCH_FAILED)


def _become(uid: int, gid: int) -> None:
    os.setgroups([gid])
    os.setgid(gid)
    os.setuid(uid)


def _forget_standard_input() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _leave_watcher(death_signal: int) -> None:
    target = os.getpid()
    life_read, life_write = os.pipe()
    middle = os.fork()
    if middle:
        os.close(life_read)
        os.set_inheritable(life_write, True)
        os.waitpid(middle, 0)
        return
    if os.fork():
        os._exit(0)
    os.close(life_write)
    try:
        ready, _, _ = select.select([0, life_read], [], [])
        if life_read not in ready:
            os.kill(target, death_signal)
    finally:
        os._exit(0)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):  # a shell's background jobs ignore the first two
        signal.signal(number, signal.SIG_DFL)
    main(sys.argv[1:])
