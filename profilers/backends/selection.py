"""Which runtime measures a CUDA device: the best one that really runs there."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence

from profilers.backends import Backend
from profilers.backends.onnxruntime_cuda import PROVIDERS, check_provider
from profilers.backends.registry import RUNTIMES
from profilers.backends.tensorrt.build import INSTALL, MODULES
from profilers.cards.cuda_device import check_cuda
from profilers.errors import BackendUnavailable
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.workers.isolated import Isolated
from profilers.workers.parallel import Parallel

PROBE = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 14x14 b1 fp32 +relu")
PROBE_CHANNELS = 32
PROBE_LIMIT_S = 120.0
"""A first run may compile kernels for the card; what takes longer than this hangs."""


def open_cuda(
    device: str,
    backend: str | None,
    precision: str,
    batch_size: int,
    include_copies: bool = False,
) -> Backend:
    """The backend for one or several CUDA devices.

    Raises:
        BackendUnavailable: see ``open_backend``; several devices must be of one kind.
    """
    devices = device.split(",")
    if len(set(devices)) < len(devices):
        raise BackendUnavailable(f"--device {device} names a device twice")
    for each in devices:
        check_cuda(each)

    def opened(name: str, where: str) -> Isolated:
        return Isolated(where, name, precision, batch_size, include_copies=include_copies)

    first = choose(lambda name: opened(name, devices[0]), backend)
    if len(devices) == 1:
        return first
    others = [opened(first.name, where) for where in devices[1:]]
    return Parallel([first, *others], devices)


def choose(opened: Callable[[str], Isolated], backend: str | None) -> Isolated:
    """The wanted backend, or the first of ``preference()`` that compiles and runs a convolution.

    Trying is what settles it: an installed runtime may lack a library, a driver or this card.

    Raises:
        BackendUnavailable: the wanted one does not run, or none does; with every reason.
    """
    if backend is not None:
        chosen = opened(backend)
        probe(chosen)
        chosen.add_notes([f"{backend}: asked for"])
        return chosen
    passed: list[str] = []
    for name in preference():
        if (reason := absent(name)) is not None:  # without starting a process for it
            passed.append(f"{name} passed over: {reason}")
            continue
        candidate = opened(name)
        try:
            probe(candidate)
        except BackendUnavailable as error:
            candidate.close()
            passed.append(f"{name} passed over: {error}")
            continue
        candidate.add_notes([_why(name, passed), *passed])
        return candidate
    raise BackendUnavailable("no runtime measures this device. " + ". ".join(passed))


def preference() -> tuple[str, ...]:
    """Names of CUDA's runtimes, best first: what a network is deployed with where it is there."""
    return RUNTIMES.ranked("cuda")


def absent(name: str) -> str | None:
    """Why a backend's package cannot be used at all; None where it is installed."""
    if name in MODULES:
        spec = importlib.util.find_spec(MODULES[name])
        # tensorrt-stubs leaves a folder without code, which has no origin
        return None if spec and spec.origin else f"not installed: {INSTALL[name]}"
    if name in PROVIDERS:
        import onnxruntime

        try:
            check_provider(PROVIDERS[name], onnxruntime)
        except BackendUnavailable as error:
            return str(error)
    return None


def probe(backend: Isolated, limit_s: float = PROBE_LIMIT_S) -> None:
    """Compile and run one small convolution.

    Raises:
        BackendUnavailable: it does not work here, or not within ``limit_s``.
    """
    late = threading.Event()

    def give_up() -> None:
        late.set()
        backend.interrupt()

    watchdog = threading.Timer(limit_s, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        with backend.open_layer(layer_model(PROBE, PROBE_CHANNELS, PROBE_CHANNELS)) as runner:
            runner.elapsed_ms(2)
    except BackendUnavailable as error:
        if late.is_set():
            raise BackendUnavailable(
                f"{backend.name} did not run one convolution within {limit_s:.0f} s"
            ) from error
        raise
    finally:
        watchdog.cancel()


def _why(name: str, passed: Sequence[str]) -> str:
    if not passed:
        return f"{name}: the first choice on CUDA, and it runs here"
    return f"{name}: the best of {', '.join(preference())} that runs here"
