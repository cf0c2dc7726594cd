"""Timing by the device's own clock, and CUDA graphs: what the CUDA backends share.

Inputs lie on the device before the clock starts. A layer is captured several times in a row, as
it runs inside a network's graph, where no call stands between two kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from profilers.timing import Runner

if TYPE_CHECKING:
    import torch

LAYER_REPEATS = 16
WARMUPS_BEFORE_CAPTURE = 3


class DeviceClock(Protocol):
    """Times work that a device may do later than it was asked."""

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        """Milliseconds from the start to the end of all work that ``work`` gives the device."""
        ...


class HostClock:
    """For a device that has done the work when the call returns: the CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        """By the host's monotonic clock."""
        start = self._clock()
        work()
        return (self._clock() - start) * 1e3


class EventClock:
    """CUDA events on a stream, 0.5 microseconds fine.

    Args:
        stream: the work's stream.
        event: makes an event (``torch.cuda.Event``, or a fake of it).
        on_stream: context manager that makes a stream current.
    """

    def __init__(
        self,
        stream: Any,
        event: Callable[..., Any] | None = None,
        on_stream: Callable[[Any], Any] | None = None,
    ) -> None:
        if event is None or on_stream is None:
            import torch

            event, on_stream = torch.cuda.Event, torch.cuda.stream
        self._stream, self._event, self._on_stream = stream, event, on_stream

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        """Between two events around the work."""
        start = self._event(enable_timing=True)
        end = self._event(enable_timing=True)
        with self._on_stream(self._stream):
            start.record(self._stream)
            work()
            end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end))


class DeviceRunner(Runner):
    """A model on a device.

    Args:
        call: gives the device ``runs_per_call`` runs of the model.
    """

    def __init__(
        self, call: Callable[[], object], clock: DeviceClock, runs_per_call: int = 1
    ) -> None:
        self._call = call
        self._device_clock = clock
        self._runs_per_call = runs_per_call

    def elapsed_ms(self, loops: int) -> float:
        """Milliseconds that ``loops`` runs take on the device."""
        calls = -(-loops // self._runs_per_call)

        def work() -> None:
            for _ in range(calls):
                self._call()

        return self._device_clock.elapsed_ms(work) * loops / (calls * self._runs_per_call)


def captured(
    run: Callable[[], object],
    stream: torch.cuda.Stream,
    repeats: int = 1,
    error_mode: str = "global",
) -> Callable[[], object]:
    """A CUDA graph of ``repeats`` runs; calling the result replays it on the current stream.

    The result keeps ``run`` alive, and with it the weights and inputs that the graph reads by
    their addresses: without that, their memory would go to others.

    Args:
        run: works on ``stream`` (or on the current one) with tensors that stay where they are.
        error_mode: CUDA's; ``relaxed`` lets a runtime allocate memory meanwhile.
    """
    import torch

    with torch.cuda.stream(stream):
        for _ in range(WARMUPS_BEFORE_CAPTURE):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=error_mode):
        for _ in range(repeats):
            run()

    def replay(keeps: Callable[[], object] = run) -> None:
        graph.replay()

    return replay


def on_host(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tensor, one like it in pinned host memory) pairs."""
    import torch

    return [(tensor, torch.empty_like(tensor, device="cpu").pin_memory()) for tensor in tensors]


def with_copies(
    run: Callable[[], object],
    inputs: list[tuple[torch.Tensor, torch.Tensor]],
    outputs: list[tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[], object]:
    """``run`` with its inputs brought from, and its outputs brought to, pinned host memory.

    Args:
        inputs, outputs: (device tensor, host tensor) pairs.
    """

    def call() -> None:
        for device, host in inputs:
            device.copy_(host, non_blocking=True)
        run()
        for device, host in outputs:
            host.copy_(device, non_blocking=True)

    return call
