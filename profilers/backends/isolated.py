"""A backend whose models run in a process of their own; see ``worker`` for why."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.errors import BackendUnavailable
from profilers.timing import Round, Runner, SamplePlan


class RemoteRunner(Runner):
    """The model that is open in the worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def elapsed_ms(self, loops: int) -> float:
        """Milliseconds that ``loops`` runs took, by the worker's clock."""
        return self._worker.ask({"loops": loops})["elapsed_ms"]

    def take_round(self, plan: SamplePlan) -> Round:
        """A whole round in the worker, so that nothing else wakes up during it."""
        return Round(**self._worker.ask({"round": dataclasses.asdict(plan)}))


class Worker:
    """A worker process, started at the first question and ended with its owner."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            BackendUnavailable: the runtime refused the model, or the worker died.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.stop()
            raise BackendUnavailable(
                f"the measuring process ended unexpectedly (exit code {process.returncode})"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise BackendUnavailable(f"the runtime refused a model: {answer['error']}")
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process.wait(timeout=60)
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "profilers.backends.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._arguments) + "\n")


class IsolatedOnnxRuntimeCpu(OnnxRuntimeCpu):
    """``OnnxRuntimeCpu`` that times in a worker process (and computes outputs in this one)."""

    def __init__(self, batch_size: int = 1, threads: int | None = None) -> None:
        super().__init__(batch_size, threads)
        self._worker = Worker({"batch_size": self.batch_size, "threads": self.threads})
        self._folder = Path(tempfile.mkdtemp(prefix="dsa_hw_"))
        weakref.finalize(self, _clean_up, self._worker, self._folder)

    def renew(self) -> None:
        """End the worker; the next model gets a new process."""
        self._worker.stop()

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        """The whole model, in the worker."""
        with self._opened(model, layer=False) as runner:
            yield runner

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        """One layer as inside a network, in the worker."""
        with self._opened(model, layer=True) as runner:
            yield runner

    @contextmanager
    def _opened(self, model: bytes | Path, layer: bool) -> Iterator[Runner]:
        path = self._folder / "model.onnx"
        if isinstance(model, bytes):
            path.write_bytes(model)
        else:
            path = model
        self._worker.ask({"open": str(path.absolute()), "layer": layer})
        try:
            yield RemoteRunner(self._worker)
        finally:
            self._worker.ask({"close": True})


def _clean_up(worker: Worker, folder: Path) -> None:
    worker.stop()
    shutil.rmtree(folder, ignore_errors=True)
