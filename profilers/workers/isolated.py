"""A backend whose models run in a process of their own; see ``worker`` for why."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.backends.packing import pack_models
from profilers.backends.registry import RUNTIMES, device_kind
from profilers.cards.nvml import Card, NvmlAbsent, Watch, energy_per_run_mj, measuring_pids
from profilers.errors import BackendUnavailable
from profilers.speed import Speed
from profilers.timing import Round, Runner, SamplePlan
from profilers.workers.model_files import ModelFiles
from profilers.workers.process import Worker
from profilers.workers.scratch import Scratch

TRIES = 4
COOL_DOWN_S = 0.5
"""A round that the card was held back in is taken again after this pause, doubled each time."""
STEADY = 3
LAYERS_PER_PACK = 24


class RemoteRunner(Runner):
    """The model that is open in the worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def elapsed_ms(self, loops: int) -> float:
        """Milliseconds that ``loops`` runs took, by the worker's clock."""
        return self._worker.ask({"loops": loops})["elapsed_ms"]

    def take_round(self, plan: SamplePlan) -> Round:
        """A whole round in the worker, so that nothing else wakes up during it."""
        return _round(self._worker.ask({"round": dataclasses.asdict(plan)}))

    def speed(self) -> Speed | None:
        """By the worker's reference kernels; None on a card."""
        answer = self._worker.ask({"speed": True})["speed"]
        return None if answer is None else Speed(**answer)


class WatchedRunner(RemoteRunner):
    """A ``RemoteRunner`` whose rounds do not count while the card is held back."""

    def __init__(self, worker: Worker, watch: Watch) -> None:
        super().__init__(worker)
        self._watch = watch

    def take_round(self, plan: SamplePlan) -> Round:
        """A round at full speed, or the last of ``TRIES``."""
        return at_full_speed(self._watch, lambda: super(WatchedRunner, self).take_round(plan))


def _round(answer: dict[str, Any]) -> Round:
    speed = answer.get("speed")
    return Round(**answer | {"speed": None if speed is None else Speed(**speed)})  # pyright: ignore


Taken = TypeVar("Taken")


def at_full_speed(watch: Watch, take: Callable[[], Taken]) -> Taken:
    """What ``take`` measures while the card is not held back, or at the last of ``TRIES``.

    A card that has been held back through ``STEADY`` such measurements in a row is in the state
    that it will be in: from then on waiting for a better one is given up, until it comes.
    """
    attempt = 0
    while True:
        before = watch.read()
        taken = take()
        reasons = watch.held_back(before)
        if not reasons:
            watch.kept_in_a_row = 0
            return taken
        attempt += 1
        if attempt == TRIES or watch.kept_in_a_row >= STEADY:
            watch.keep_throttled()
            return taken
        watch.drop(reasons)
        time.sleep(COOL_DOWN_S * 2 ** (attempt - 1))


class IsolatedOnnxRuntimeCpu(OnnxRuntimeCpu):
    """``OnnxRuntimeCpu`` that times in a worker process (and computes outputs in this one)."""

    def __init__(self, batch_size: int = 1, threads: int | None = None) -> None:
        super().__init__(batch_size, threads)
        self._worker = Worker(
            {"device": "cpu", "batch_size": self.batch_size, "threads": self.threads}, copies=True
        )
        scratch = Scratch()
        self._folder = scratch.path
        weakref.finalize(self, _clean_up, self._worker, scratch)

    def renew(self) -> None:
        """The next model gets a new process."""
        self._worker.renew()

    def observations(self) -> tuple[str, ...]:
        """Whether the worker had to be replaced."""
        return (*super().observations(), *self._worker.observations())

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
            self._worker.close()


class Isolated:
    """A backend of which everything happens in a worker process: the CUDA runtimes.

    There too, for other reasons than on the CPU: a runtime that crashes, or a kernel that breaks
    its CUDA context, ends the worker and not the search; runtimes bring libraries that need not
    agree with PyTorch's here; and several devices measure at once.

    Args:
        device, backend, precision, batch_size, include_copies, threads: see ``open_backend``.
    """

    def __init__(
        self,
        device: str,
        backend: str,
        precision: str = "fp32",
        batch_size: int = 1,
        include_copies: bool = False,
        threads: int | None = None,
    ) -> None:
        self.name = backend
        self.batch_size = batch_size
        entry = RUNTIMES.find(backend, device_kind(device))
        arguments: dict[str, Any] = {
            "device": device,
            "backend": backend,
            "precision": precision,
            "batch_size": batch_size,
            "threads": threads,
            "include_copies": include_copies,
            "entry": dataclasses.asdict(entry),
        }
        self._worker = Worker(arguments)
        scratch = Scratch()
        self._folder = scratch.path
        self._files = ModelFiles(self._folder)
        self._notes: list[str] = []
        self._described: dict[str, Any] | None = None
        self._packs_layers = entry.packs_layers
        self._packed_rounds = 0
        self._unpacked = ""
        self._watch: Watch | None = None
        self._finalizer = weakref.finalize(self, _clean_up, self._worker, scratch)

    def renew(self) -> None:
        """Keeps its process: a new CUDA context and new engines would take seconds a round."""

    @property
    def layers_pay_call(self) -> bool:
        """As the backend in the worker says."""
        return self._describe()["layers_pay_call"]

    def add_notes(self, notes: Iterable[str]) -> None:
        """Say more about the choice of this backend."""
        self._notes += notes

    def notes(self) -> tuple[str, ...]:
        """Why it was chosen, and whether its card is watched."""
        self._watching()
        return (*self._notes, *self._describe()["notes"])

    def observations(self) -> tuple[str, ...]:
        """What NVML saw while measuring, and whether layers were packed."""
        packing = [self._unpacked] if self._unpacked else []
        if self._packed_rounds:
            packing.append(f"{self._packed_rounds} rounds of layers were timed in packs")
        seen = self._watch.observations() if self._watch else ()
        return (*packing, *seen, *self._worker.observations())

    @property
    def layers_per_pack(self) -> int:
        """The most layers that ``pack_rounds`` takes; 1 where layers are timed one by one."""
        return LAYERS_PER_PACK if self._packs_layers else 1

    def pack_rounds(self, models: Sequence[bytes]) -> list[Round] | None:
        """A round of each of several layers, in one build; None where that cannot be believed.

        After a refusal, or a pack that could not be built, layers are timed one by one, and
        ``observations`` says why.
        """
        question = {"pack": str(self._files.path(pack_models(models)))}
        try:
            answer = at_full_speed(self._watching(), lambda: self._worker.ask(question))
            refusal = answer.get("refused")
        except BackendUnavailable as error:
            answer, refusal = {}, str(error)
        if refusal is not None:
            self._packs_layers = False
            self._unpacked = f"layers are timed one by one, not in packs: {refusal}"
            return None
        self._packed_rounds += len(answer["rounds"])
        return [_round(taken) for taken in answer["rounds"]]

    def provenance(self) -> dict[str, str | int]:
        """What a measurement here depends on."""
        return dict(self._describe()["provenance"])

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

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """First output of the model on ``inputs`` (N, C, H, W), computed in the worker."""
        given, found = self._folder / "inputs.npy", self._folder / "outputs.npy"
        np.save(given, inputs)
        self._worker.ask(
            {"outputs": str(self._files.path(model)), "inputs": str(given), "to": str(found)}
        )
        return np.load(found)

    def layer_times(self, model: bytes | Path) -> dict[str, Any]:
        """Each layer's ms inside the network, by the runtime's own profiler.

        Raises:
            BackendUnavailable: the runtime has no profiler.
        """
        return self._worker.ask({"layer_times": str(self._files.path(model))})["times"]

    def energy_mj(self, model: bytes | Path, seconds: float = 2.0) -> float | None:
        """Millijoules of the whole card for one run; None where it does not count energy."""
        card = self._watching().card
        if card is None:
            return None
        with self.open(model) as runner:
            per_run = runner.take_round(SamplePlan(sample_ms=50.0, samples=3)).median_ms

            def run_for(wanted_s: float) -> int:
                loops = max(1, round(wanted_s * 1e3 / per_run))
                runner.elapsed_ms(loops)
                return loops

            return energy_per_run_mj(card, run_for, seconds)

    def interrupt(self) -> None:
        """End the worker at once, from another thread: what waits for it fails."""
        self._worker.kill()

    def close(self) -> None:
        """End the worker."""
        self._finalizer()

    @contextmanager
    def _opened(self, model: bytes | Path, layer: bool) -> Iterator[Runner]:
        self._worker.ask({"open": str(self._files.path(model)), "layer": layer})
        try:
            yield WatchedRunner(self._worker, self._watching())
        finally:
            self._worker.close()

    def _describe(self) -> dict[str, Any]:
        if self._described is None:
            self._described = self._worker.ask({"describe": True})
        return self._described

    def _watching(self) -> Watch:
        """Begun at the first use: only the worker can tell which card it is on."""
        if self._watch is None:
            uuid, card = self._describe()["uuid"], None
            if uuid is not None:
                try:
                    card = Card(uuid)
                except NvmlAbsent as absent:
                    self._notes.append(f"the card is not watched while measuring: {absent}")
            self._watch = Watch(card, measuring_pids)
        return self._watch


def _clean_up(worker: Worker, scratch: Scratch) -> None:
    worker.stop()
    scratch.remove()
