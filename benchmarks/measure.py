"""Run one program and say what it cost: `measure.py RESULT DEADLINE_S PROGRAM [ARGUMENT…]`.

A process of its own, as small as Python can be: Linux counts the memory of the process that starts a program into the
program's peak. Writes wall seconds, CPU seconds (of all its processes), peak RSS in KiB and exit code to RESULT.
"""

import os
import signal
import sys
import time


def main() -> None:
    """Start, wait, write down."""
    result, deadline_s, *argv = sys.argv[1:]
    start = time.monotonic()
    pid = os.posix_spawn(argv[0], argv, os.environ)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(int(deadline_s))
    _, status, used = os.wait4(pid, 0)
    wall_s = time.monotonic() - start
    cpu_s = used.ru_utime + used.ru_stime
    with open(result, "w", encoding="ascii") as file:  # noqa: PTH123 (pathlib would cost memory)
        file.write(f"{wall_s} {cpu_s} {used.ru_maxrss} {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
