"""The process in which models are timed: it imports a runtime and nothing else.

A process that has trained with PyTorch times ONNX Runtime half as fast as a deployed one would
run (1.5 to 1.7 times the latency was seen), so measuring happens in one of its own.

Protocol: one JSON object a line on standard input and output. The first line in is the backend's
arguments; then ``{"describe": true}``, ``{"open": path, "layer": bool}``, ``{"round": plan}``,
``{"speed": true}``, ``{"loops": n}``, ``{"close": true}``, ``{"layer_times": path}``,
``{"outputs": path, "inputs": path, "to": path}``, ``{"pack": path}`` and ``{"renew": true}`` in any
sensible order, each answered by one line. Where the first line has ``"copies": true``, what answers
is a copy of this process (see ``fresh``), and ``renew`` makes it a fresh one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from profilers.timing import Round, Runner, SamplePlan
from profilers.workers.fresh import run_copies

if TYPE_CHECKING:
    from profilers.backends.registry import BackendInfo
    from profilers.speed import Speed
    from profilers.workers.speedometer import Speedometer


def in_process(
    device: str = "cpu",
    backend: str = "onnxruntime",
    precision: str = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
    include_copies: bool = False,
    entry: dict[str, Any] | None = None,
    owns_process: bool = False,
) -> Any:
    """The backend itself, without a process around it; imports its runtime and nothing else.

    Args:
        entry: fields of the ``BackendInfo`` of a runtime that was registered in another process;
            None looks ``backend`` up here.

    Raises:
        BackendUnavailable: there is none of this name, or it does not work here.
    """
    return _info(device, backend, entry).made(
        {
            "device": device,
            "backend": backend,
            "precision": precision,
            "batch_size": batch_size,
            "threads": threads,
            "include_copies": include_copies,
            "owns_process": owns_process,
        }
    )


def load_runtime(
    device: str = "cpu",
    backend: str = "onnxruntime",
    entry: dict[str, Any] | None = None,
    **_: Any,
) -> None:
    """Import what measuring needs; what cannot be imported is told when it is used."""
    with contextlib.suppress(ImportError):
        importlib.import_module(_info(device, backend, entry).module)
        from profilers.layers.models import reference_model

        reference_model()


def _info(device: str, backend: str, entry: dict[str, Any] | None) -> BackendInfo:
    from profilers.backends.registry import RUNTIMES, BackendInfo, device_kind

    return BackendInfo(**entry) if entry else RUNTIMES.find(backend, device_kind(device))


class Server:
    """Answers requests with one backend, made at the first of them."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._backend: Any = None
        self._opened = ExitStack()
        self._runner: Runner | None = None
        self._speedometer: Speedometer | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request; whatever fails becomes its text.

        ``broken`` says that nothing works in this process any more.
        """
        from profilers.errors import ProfilerError

        try:
            return self._answer(request)
        except ProfilerError as error:
            reason = str(error)
        except Exception as error:  # told to the other side, which raises it
            refused = "the runtime refused a model" if "open" in request else "the runtime failed"
            reason = f"{refused}: {type(error).__name__}: {error}"
        return {"error": reason, "broken": cuda_is_broken()}

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._backend is None:
            self._backend = in_process(**self._arguments, owns_process=True)
        backend = self._backend
        if "open" in request:
            model = Path(request["open"])
            subject = (
                backend.open_layer(model.read_bytes()) if request["layer"] else backend.open(model)
            )
            self._runner = self._opened.enter_context(subject)
        elif "close" in request:
            self._runner = None
            self._opened.close()
        elif "round" in request:
            return dataclasses.asdict(self._round(SamplePlan(**request["round"])))
        elif "speed" in request:
            speed = self._speed()
            return {"speed": None if speed is None else dataclasses.asdict(speed)}
        elif "loops" in request:
            assert self._runner is not None
            return {"elapsed_ms": self._runner.elapsed_ms(request["loops"])}
        elif "describe" in request:
            return self._describe()
        elif "outputs" in request:
            import numpy as np

            found = backend.outputs(Path(request["outputs"]), np.load(request["inputs"]))
            np.save(request["to"], found)
        elif "layer_times" in request:
            return {"times": self._layer_times(Path(request["layer_times"]))}
        elif "pack" in request:
            return self._pack_rounds(Path(request["pack"]))
        return {}

    def _round(self, plan: SamplePlan) -> Round:
        """A round, and how fast the machine was: the slower of before and after it."""
        assert self._runner is not None
        before = self._speed()
        taken = self._runner.take_round(plan)
        after = self._speed(again=True)
        if before is None or after is None:
            return taken
        return dataclasses.replace(taken, speed=before.slowest(after))

    def _speed(self, again: bool = False) -> Speed | None:
        """None on a card, which is watched in other ways."""
        if self._arguments.get("device", "cpu") != "cpu":
            return None
        if self._speedometer is None:
            from profilers.cpu_threads import CpuThreads
            from profilers.workers.speedometer import Speedometer

            own = getattr(self._backend, "cpu_threads", None)
            self._speedometer = Speedometer(own or CpuThreads(self._arguments.get("threads")))
        return self._speedometer.read(again)

    def _describe(self) -> dict[str, Any]:
        device = self._arguments.get("device", "cpu")
        uuid = None
        if device != "cpu":
            from profilers.cards.cuda_device import cuda_index, device_uuid

            uuid = device_uuid(cuda_index(device))
        return {
            "provenance": self._backend.provenance(),
            "layers_pay_call": self._backend.layers_pay_call,
            "notes": list(self._backend.notes()),
            "uuid": uuid,
        }

    def _pack_rounds(self, packed: Path) -> dict[str, Any]:
        from profilers.backends.tensorrt.packs import PackingRefused

        try:
            rounds = self._backend.pack_rounds(packed)
        except PackingRefused as refused:
            return {"refused": str(refused)}
        return {"rounds": [dataclasses.asdict(taken) for taken in rounds]}

    def _layer_times(self, model: Path) -> dict[str, Any]:
        from profilers.errors import BackendUnavailable

        if not hasattr(self._backend, "layer_times"):
            raise BackendUnavailable(
                f"{self._backend.name} has no profiler of layers; tensorrt and tensorrt-rtx do"
            )
        return dataclasses.asdict(self._backend.layer_times(model))


def cuda_is_broken() -> bool:
    """Whether CUDA fails at whatever it is asked from now on, as after a kernel's bad access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def serve(requests: Iterator[str], answers: TextIO, arguments: dict[str, Any]) -> bool:
    """Answer requests until there are no more, or one wants a fresh process; says whether it did.

    Args:
        arguments: the backend's.
    """
    server = Server(arguments)
    for line in requests:
        request = json.loads(line)
        answer = {} if "renew" in request else server.answer(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "renew" in request:
            return True
    return False


def main() -> None:
    """Serve what started this process, on its standard input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's business
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a runtime prints is not an answer
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unread:
        arguments = json.loads(unread.readline())  # no more than that: the rest is a copy's

    def work() -> bool:
        with open(sys.stdin.fileno(), encoding="utf-8", closefd=False) as requests:
            return serve(iter(requests.readline, ""), channel, arguments)

    if arguments.pop("copies", False):
        load_runtime(**arguments)
        run_copies(work)
    else:
        work()


if __name__ == "__main__":
    main()
