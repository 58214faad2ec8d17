"""The first process of a container: enters a namespace with its own /opt/ml, runs the program, kills what is left.

Run as a file by an isolated Python, so that it starts in milliseconds. Its argument is JSON:
{"command": [...], "folder": what /opt/ml shall be, or null, "hosts": what /etc/hosts shall be, or null}.
Standard input is the lifeline: when its other end is closed, on purpose or because the server was killed, every
process of the container is killed. SIGTERM goes to the program, as a container's first process would get it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

NO_NAMESPACE = 70
"""Exit code: this machine does not allow a private mount namespace."""
NOT_STARTED = 127
"""Exit code: there is no such program."""
MODEL_FOLDER = "/opt/ml"

_LIBC = ctypes.CDLL(None, use_errno=True)
_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_BIND, _RECURSIVE, _PRIVATE = 1 << 12, 1 << 14, 1 << 18


def main() -> NoReturn:
    """Run the program; exit with its code, or with 128 and the number of the signal that ended it."""
    order = json.loads(sys.argv[1])
    # Processes that the program leaves behind, in whatever session, become this one's children: to be killed with it.
    _LIBC.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if order["folder"] is not None:
        try:
            enter_namespace(Path(order["folder"]), order["hosts"])
        except OSError as error:
            print(f"no private mount namespace: {error}", file=sys.stderr)
            sys.exit(NO_NAMESPACE)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGCHLD, lambda *_: None)
    program = os.fork()
    if program == 0:
        _exec(order["command"])
    signal.signal(signal.SIGTERM, lambda *_: _send(program, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    code = None
    while code is None:
        ready, _, _ = select.select([0, woken], [], [])
        if 0 in ready and not os.read(0, 1):
            code = 128 + signal.SIGKILL
        if woken in ready:
            os.read(woken, 4096)
            code = _reap().get(program, code)
    while sum(_send(process, signal.SIGKILL) for process in _descendants()):
        _reap()
        time.sleep(0.002)
    os._exit(code)


def enter_namespace(folder: Path, hosts: str | None) -> None:
    """Enter a private mount namespace where /opt/ml is `folder` and /etc/hosts is `hosts`.

    Raises:
        OSError: the machine does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_MOUNTS):
        _check(_LIBC.unshare(_NEW_USER | _NEW_MOUNTS))  # an ordinary user needs a user namespace as well
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(_LIBC.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None))
    target = Path(MODEL_FOLDER)
    if not target.is_dir():
        _rebuild(target.parent, folder.parent / "opt", target.name)
    _bind(folder, target)
    if hosts is not None:
        _bind(Path(hosts), Path("/etc/hosts"))


def _rebuild(folder: Path, scratch: Path, name: str) -> None:
    """Mount over `folder` one with the same contents and a folder `name`, without changing the machine's own."""
    (scratch / name).mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        target = scratch / entry.name
        if entry.is_symlink():
            target.symlink_to(entry.readlink())
            continue
        if entry.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _bind(entry, target)
    _bind(scratch, folder)


def _bind(source: Path, target: Path) -> None:
    _check(_LIBC.mount(os.fsencode(source), os.fsencode(target), None, _BIND | _RECURSIVE, None))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _exec(command: list[str]) -> NoReturn:
    """Replace this process by the program."""
    _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
        os._exit(NOT_STARTED)


def _reap() -> dict[int, int]:
    """Return process id and exit code of the children that have ended."""
    ended: dict[int, int] = {}
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if process == 0:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended[process] = code if code >= 0 else 128 - code


def _descendants() -> list[int]:
    """Return every living process below this one."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names are enough
        if entry.isdigit():
            try:
                after_name = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry)] = int(after_name[1])
    family = [os.getpid()]
    for process in family:
        family += [child for child, parent in parents.items() if parent == process]
    return family[1:]


def _send(process: int, number: signal.Signals) -> bool:
    """Send a signal; return False if the process is gone or belongs to another user."""
    try:
        os.kill(process, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main()
