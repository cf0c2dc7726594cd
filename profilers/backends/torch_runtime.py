"""PyTorch as a runtime: eager, CUDA graphs, ``torch.compile``; channels-last, half or autocast.

What is timed is the exported graph (batch-norms folded) run by PyTorch, so that the same file is
compared across runtimes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch

from profilers.backends.onnx_torch import OnnxModule
from profilers.cards.cuda_clock import (
    LAYER_REPEATS,
    DeviceRunner,
    EventClock,
    HostClock,
    captured,
    with_copies,
)
from profilers.cards.cuda_device import check_cuda, cuda_index, runtime_provenance
from profilers.cards.kept import KeptModels, card_is_full, release_cached_memory
from profilers.errors import BackendUnavailable
from profilers.host import available_cpus, cpu_identity
from profilers.timing import Runner
from profilers.workers.model_files import model_key

MODES = {
    "torch": "CUDA graphs",
    "torch-eager": "eager",
    "torch-compile": "torch.compile, CUDA graphs",
    "torch-autocast": "autocast, CUDA graphs",
}
"""How each of the backends' names runs a model."""
CPU_MODES = {"torch-eager": "eager", "torch-compile": "torch.compile"}
"""The same on the CPU."""
MOST_KEPT_BY_HOST = 512


class TorchRuntime:
    """PyTorch on a CUDA device (or, eagerly or compiled, on the CPU).

    Models stay ready after they are closed, as far as the card's memory allows: opening the same
    model for its next round is then free.

    Args:
        device: ``cuda:N`` or ``cpu``.
        mode: a key of ``MODES``.
        include_copies: time the copies of inputs and outputs from and to the host too.

    Raises:
        BackendUnavailable: no such device, or not at that precision.
    """

    def __init__(
        self,
        device: str = "cuda:0",
        mode: str = "torch",
        precision: str = "fp32",
        batch_size: int = 1,
        include_copies: bool = False,
    ) -> None:
        self.name = mode
        self.batch_size, self.precision = batch_size, precision
        self._on_cuda = device != "cpu"
        if precision == "int8":
            raise BackendUnavailable(
                "the torch backends measure fp32 and fp16; int8 needs tensorrt or tensorrt-rtx"
            )
        if self._on_cuda:
            check_cuda(device)
            torch.cuda.set_device(cuda_index(device))
            # Shapes are fixed, so cuDNN's fastest algorithm is looked for, as a deployment would.
            torch.backends.cudnn.benchmark = True
        elif mode not in CPU_MODES or precision != "fp32":
            raise BackendUnavailable(
                f"{mode} at {precision} is not there on the CPU; use {' or '.join(CPU_MODES)} "
                "at fp32"
            )
        else:
            torch.set_num_threads(available_cpus())
        self._device = torch.device(device)
        self._include_copies = include_copies
        self._kept = self._keeping()
        self._stream = torch.cuda.Stream() if self._on_cuda else None

    @property
    def layers_pay_call(self) -> bool:
        """Eagerly each does; in a CUDA graph none."""
        return not self._graphs

    def notes(self) -> tuple[str, ...]:
        """Nothing to say of the choice."""
        return ()

    def observations(self) -> tuple[str, ...]:
        """Nothing is watched here; see ``isolated``."""
        return ()

    def provenance(self) -> dict[str, str | int]:
        """What a measurement here depends on."""
        modes = MODES if self._on_cuda else CPU_MODES
        provider = f"{modes[self.name]}, channels-last"
        if self._on_cuda:
            return runtime_provenance(
                cuda_index(str(self._device)), runtime=self.name, version=torch.__version__,
                provider=provider, precision=self.precision, batch_size=self.batch_size,
                include_copies=self._include_copies,
            )  # fmt: skip
        name, features = cpu_identity()
        return {
            "device": name, "cpu_features": features, "driver": "none",
            "threads": torch.get_num_threads(), "runtime": self.name,
            "runtime_version": torch.__version__, "provider": provider,
            "precision": self.precision, "batch_size": self.batch_size, "expected_step": 1,
        }  # fmt: skip

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        """The whole model, with random inputs on the device."""
        yield self._runner(model, repeats=1)

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        """One layer, several times in a row where it runs as a CUDA graph."""
        yield self._runner(model, repeats=LAYER_REPEATS if self._graphs else 1)

    @torch.inference_mode()
    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """First output of the model on ``inputs`` (N, C, H, W)."""
        module, _ = self._module(_loaded(model))
        value = self._placed(torch.from_numpy(inputs))
        with self._autocast():
            return module(value).float().cpu().numpy()

    @property
    def _graphs(self) -> bool:
        return self._on_cuda and self.name != "torch-eager"

    def _runner(self, model: bytes | Path, repeats: int) -> Runner:
        key = f"{repeats} {model_key(model)}"
        call = self._kept.get(key, lambda: self._prepared(_loaded(model), repeats))
        clock = HostClock() if self._stream is None else EventClock(self._stream)
        return DeviceRunner(call, clock, repeats)

    def _keeping(self) -> KeptModels[Callable[[], object]]:
        if self._on_cuda:
            return KeptModels(card_is_full, release_cached_memory)
        return KeptModels(lambda: False, lambda: None, MOST_KEPT_BY_HOST)

    def _prepared(self, model: onnx.ModelProto, repeats: int) -> Callable[[], object]:
        module, shapes = self._module(model)
        generator = torch.Generator().manual_seed(0)
        hosts = [torch.randn(shape, generator=generator) for shape in shapes]
        inputs = [self._placed(host) for host in hosts]
        call: Callable[..., torch.Tensor] = module
        if self.name == "torch-compile":
            # Not with Inductor's own graphs: they would copy the inputs.
            call = torch.compile(with_own_code(module), dynamic=False, fullgraph=True)

        def run() -> torch.Tensor:
            with torch.inference_mode(), self._autocast():
                return call(*inputs)

        if self._stream is None:
            return run
        self._stream.wait_stream(torch.cuda.current_stream())  # which placed weights and inputs
        with torch.cuda.stream(self._stream):
            output = run()
        self._stream.synchronize()
        timed: Callable[[], object] = run
        if self._include_copies:
            timed = with_copies(*self._copying(run, hosts, inputs, output))
        return captured(timed, self._stream, repeats) if self._graphs else timed

    def _copying(
        self,
        run: Callable[[], torch.Tensor],
        hosts: list[torch.Tensor],
        inputs: list[torch.Tensor],
        output: torch.Tensor,
    ):
        """Arguments of ``with_copies``; outputs are copied within ``run``, as each is a new one."""
        pinned = [
            host.to(device.dtype).contiguous(memory_format=_format(host)).pin_memory()
            for host, device in zip(hosts, inputs, strict=True)
        ]
        result = torch.empty_like(output, device="cpu").pin_memory()

        def run_and_fetch() -> None:
            result.copy_(run(), non_blocking=True)

        return run_and_fetch, list(zip(inputs, pinned, strict=True)), []

    def _module(self, model: onnx.ModelProto) -> tuple[OnnxModule, list[tuple[int, ...]]]:
        module = OnnxModule(model, self._dtype, self._device).eval()
        return module, list(module.input_shapes.values())

    @property
    def _dtype(self) -> torch.dtype:
        """Of weights and inputs: autocast keeps float32 ones and casts at each layer."""
        half = self.precision == "fp16" and self.name != "torch-autocast"
        return torch.float16 if half else torch.float32

    def _autocast(self):
        on = self.name == "torch-autocast" and self.precision == "fp16"
        # The cache of cast weights must not outlive a capture: it would hold the graph's memory.
        return torch.autocast(self._device.type, torch.float16, enabled=on, cache_enabled=False)

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._device, self._dtype).contiguous(memory_format=_format(value))


def with_own_code(module: OnnxModule) -> Callable[..., torch.Tensor]:
    """The module's forward pass, sharing no code with another's.

    PyTorch counts recompilations by code, and gives up after some: all modules would be one.
    """
    shared = OnnxModule.forward
    own = types.FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__)
    return types.MethodType(own, module)


def _format(value: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if value.dim() == 4 else torch.contiguous_format


def _loaded(model: bytes | Path) -> onnx.ModelProto:
    return onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
