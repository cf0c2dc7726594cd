"""Processes that start as fast as a copy: one that has imported a runtime, and copies of it.

Starting Python and importing a runtime takes longer than timing most networks, and rounds that are
to be independent of each other need a process each. So one process imports the runtime and does
nothing else; its copies (``os.fork``) measure, one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

RENEWED = 3
"""Exit code of a copy that wants another one in its place."""
PR_SET_PDEATHSIG = 1
PADDING_PAGES = 4096
"""Of the most address space that is skipped in a copy: what it maps would else always begin where
it began in the copies before it, and one layout would decide."""


def can_copy() -> bool:
    """Whether this system can copy processes, and bind a copy's life to theirs."""
    return sys.platform == "linux"


def run_copies(work: Callable[[], bool]) -> None:
    """Run ``work`` in a copy of this process, in another one if it says so, and so on.

    A copy that is killed takes this process with it, by the same signal, and the other way round.
    """
    while True:
        parent, copy = os.getpid(), os.fork()
        if not copy:
            _run_and_end(work, parent)
        _, status = os.waitpid(copy, 0)
        if os.WIFSIGNALED(status):
            with contextlib.suppress(OSError):  # SIGKILL cannot be handled in any other way
                signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
            os.kill(os.getpid(), os.WTERMSIG(status))
        if os.waitstatus_to_exitcode(status) != RENEWED:
            sys.exit(os.waitstatus_to_exitcode(status))


def _run_and_end(work: Callable[[], bool], parent: int) -> NoReturn:
    """The whole life of a copy. It never ends as Python does: what a runtime does at the end of a
    process waits for threads that a copy does not have."""
    code = 1
    try:
        _begin(parent)
        code = RENEWED if work() else 0
    except BrokenPipeError:  # its owner has gone: there is nobody to tell
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _begin(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be bound to it
        os._exit(1)
    pages = random.SystemRandom().randrange(1, PADDING_PAGES)
    _paddings.append(mmap.mmap(-1, pages * mmap.PAGESIZE))  # never touched: no memory


_paddings: list[mmap.mmap] = []
