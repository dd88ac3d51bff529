"""Runs a command of which nothing outlives whoever started this, however that one ends.

    python -I supervisor.py COMMAND ...

Its standard input is a pipe that the starter holds. It ends when the starter closes it, exits, or is killed: then the command
is told to stop (SIGTERM) within GRACE_S. What is left then is killed, as it is where the command ends by itself. Its processes
are found as descendants: those whose parent has died become children of this one (Linux).

exit status: that of the command, 128 + the signal that ended it, or 127 where it cannot be started.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 10.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(command: list[str]) -> int:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda *_: os.close(0))  # as if the starter had gone
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", flush=True)
        return 127
    ended = os.pidfd_open(child.pid)
    try:
        select.select([0, ended], [], [])
    except OSError:  # standard input has been closed by a signal
        pass
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
    while left := descendants():
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        reap(child)
        time.sleep(0.05)
    status = child.wait()
    return status if status >= 0 else 128 - status


def descendants() -> list[int]:
    """All processes that stem from this one, zombies too."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has just ended
            continue
    found = [os.getpid()]
    for ancestor in found:
        found += [pid for pid, parent in parents.items() if parent == ancestor]
    return found[1:]


def reap(child: subprocess.Popen) -> None:
    """Lets go of children that have ended, those that others left too."""
    child.poll()
    for pid in descendants():
        if pid != child.pid:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # its parent still lives
                pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
