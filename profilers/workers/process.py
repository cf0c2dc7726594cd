"""The owner's side of ``worker``: a process that answers, or is replaced by one that does."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from profilers.errors import BackendUnavailable
from profilers.workers.fresh import can_copy

ENDS_WITHIN_S = 30.0
"""After that a worker that has nothing left to answer is killed: a runtime may hang at its end."""
GRACE_S = 30.0
"""Every answer may take so long, whatever was expected: a busy machine stops everything."""
PATIENCE = 20.0
"""And so many times what was expected: the longest answer to a question of its kind so far."""
FIRST_ANSWER_S = {"cpu": 10.0, "other": 90.0}
"""Expected of a question that was never answered, by device: a GPU's runtime may compile kernels
for minutes at its first model."""
ROOT = Path(__file__).resolve().parents[2]

BOOT = """
import sys
if sys.path[:1] == ['']:
    del sys.path[0]
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
spec = PathFinder.find_spec('profilers', [sys.argv[1]])
sys.modules['profilers'] = module_from_spec(spec)
spec.loader.exec_module(sys.modules['profilers'])
from profilers.workers.server import main
main()
"""
"""Starts ``profilers.workers.server`` of this very package without the working folder on the
search path: a file ``numpy.py`` that happens to lie there is data and not NumPy."""


class _Lost(Exception):
    """The process has not answered; the message says how it went."""


class Worker:
    """A worker process, started at the first question and ended with its owner.

    A process that dies, or does not answer in time (``GRACE_S`` + ``PATIENCE`` times what was
    expected), is replaced by a new one, which gets the open model and the question again, once.

    Args:
        arguments: the backend's (``open_backend``).
        copies: whether fresh processes are copies of one that has imported the runtime, where the
            system can do that. It must be one that starts no threads when it is imported.

    Attributes:
        replaced: how often that was.
    """

    def __init__(self, arguments: dict[str, Any], copies: bool = False) -> None:
        self._arguments = arguments
        self._copies = copies and can_copy()
        self._process: subprocess.Popen[str] | None = None
        self._opened: dict[str, Any] | None = None
        self._longest_s: dict[str, float] = {}
        self._interrupted = False
        self.replaced = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            BackendUnavailable: the runtime refused the model, or two processes in a row were lost
                over it.
        """
        try:
            answer = self._answered(request)
        except _Lost as first:
            answer = self._answered_by_another(request, first)
        if "error" in answer:
            if answer.get("broken"):
                self.stop()  # the next question gets a new process
            raise BackendUnavailable(answer["error"])
        if "open" in request:
            self._opened = request
        elif "close" in request:
            self._opened = None
        return answer

    def close(self) -> None:
        """Let go of the model that is open; nothing where the process has ended with it."""
        if self._process is not None:
            self.ask({"close": True})

    def kill(self) -> None:
        """End the process in the middle of a question, which then fails."""
        self._interrupted = True
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End the process."""
        self._opened = None
        if self._process is not None:
            self._close_streams()
            try:
                self._process.wait(timeout=ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def renew(self) -> None:
        """See that the next question goes to a process that has answered none."""
        if self._copies and self._process is not None:
            self._opened = None
            self.ask({"renew": True})
        else:
            self.stop()

    def observations(self) -> tuple[str, ...]:
        """What went wrong with its processes so far; a sentence, or nothing."""
        if not self.replaced:
            return ()
        times = "once" if self.replaced == 1 else f"{self.replaced} times"
        return (f"the measuring process was lost and replaced {times}",)

    def limit_s(self, request: dict[str, Any]) -> float:
        """Seconds after which an answer is not waited for any longer."""
        on_cpu = self._arguments.get("device", "cpu") == "cpu"
        first = FIRST_ANSWER_S["cpu" if on_cpu else "other"]
        return GRACE_S + PATIENCE * self._longest_s.get(_kind(request, self._opened), first)

    def _answered_by_another(self, request: dict[str, Any], first: _Lost) -> dict[str, Any]:
        if self._interrupted or "close" in request:  # what was open has gone with its process
            self._opened = None
            if "close" in request:
                return {}
            self._interrupted = False
            raise BackendUnavailable(
                f"the measuring process ended unexpectedly: it {first}"
            ) from None
        self.replaced += 1
        try:
            if self._opened is not None and "open" not in request:
                reopened = self._answered(self._opened)
                if "error" in reopened:
                    return reopened
            return self._answered(request)
        except _Lost as second:
            self._opened = None
            raise BackendUnavailable(
                f"the measuring process {first}; a new one, given the same, {second}. If the "
                "machine is short of memory, make room or choose a smaller --batch-size"
            ) from None

    def _answered(self, request: dict[str, Any]) -> dict[str, Any]:
        """One try.

        Raises:
            _Lost: the process has ended, or was ended because it did not answer.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        limit_s, late = self.limit_s(request), threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        watchdog = threading.Timer(limit_s, give_up)
        watchdog.daemon = True
        started = time.monotonic()
        watchdog.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = ""
        except BaseException:  # Ctrl-C: the answer would be taken for the next question's
            self._end_now()
            raise
        finally:
            watchdog.cancel()
        if not line.endswith("\n"):
            self._end_now()
            if late.is_set():
                raise _Lost(f"did not answer within {limit_s:.0f} s")
            raise _Lost(_how_it_ended(process.returncode))
        kind, took = _kind(request, self._opened), time.monotonic() - started
        self._longest_s[kind] = max(took, self._longest_s.get(kind, 0.0))
        return json.loads(line)

    def _end_now(self) -> None:
        process = self._process
        assert process is not None
        process.kill()
        process.wait()
        self._close_streams()
        self._process = None

    def _close_streams(self) -> None:
        assert self._process is not None
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # it died before it was asked
                    stream.close()

    def _start(self) -> None:
        self._interrupted = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        first = self._arguments | ({"copies": True} if self._copies else {})
        self._process.stdin.write(json.dumps(first) + "\n")


def _kind(request: dict[str, Any], opened: dict[str, Any] | None) -> str:
    """Questions of one kind take times of one size: whole networks are not layers."""
    name = next(iter(request))
    return f"{name} of a layer" if (opened or request).get("layer") else name


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name} (signal {-code})"
    except ValueError:
        return f"was killed by signal {-code}"
