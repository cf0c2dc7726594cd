"""What ``python -m`` does to the module search path, and what is done about it.

``python -m`` puts the working folder first, so a file ``yaml.py`` or ``numpy.py`` that came with
somebody's run folder would be run in the place of the library. It is moved to the end: one's own
``package.module:factory`` is found there all the same, and shadows nothing.
"""

from __future__ import annotations

import os
import sys


def demote_working_folder(package: str) -> None:
    """Move the working folder from the front of the search path to its end.

    Only where ``python -m`` is about to start a command of ``package``, and not from the package's
    own checkout, whose files are the package.
    """
    words = sys.orig_argv
    started = sys.argv[:1] == ["-m"] and any(
        flag == "-m" and name.split(".")[0] == package
        for flag, name in zip(words, words[1:])  # noqa: B905, RUF007 - itertools is not loaded yet
    )
    here = os.getcwd()
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if started and here != own and sys.path[:1] and sys.path[0] in ("", here):
        del sys.path[0]
        sys.path.append(here)
