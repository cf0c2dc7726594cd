"""ONNX Runtime on the CPU."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from profilers.cpu_threads import CpuThreads
from profilers.host import HostWatch, cpu_identity
from profilers.timing import Runner
from profilers.workers.model_inputs import input_shape

if TYPE_CHECKING:
    import onnx

NCHWC_DOMAIN = "com.microsoft.nchwc"
KEPT_BYTES = 2**28
"""Of optimized layers that are kept for their next rounds: making one takes as long as a round."""
LAYER_BYTES = 2**23
"""Largest of them."""
NOISE = 2**16
"""Numbers of an input that differ: drawing millions of them takes longer than a round."""


class OnnxRuntimeCpu:
    """ONNX Runtime's CPU provider at float32 with all graph optimizations, as deployed.

    Args:
        batch_size: samples per run.
        threads: intra-operator threads; None takes the cores that this process may use.
        owns_process: whether the process is there for measuring alone (``CpuThreads``).
    """

    name = "onnxruntime"
    layers_pay_call = True

    def __init__(
        self, batch_size: int = 1, threads: int | None = None, owns_process: bool = False
    ) -> None:
        self.batch_size = batch_size
        self.cpu_threads = CpuThreads(threads, kept=owns_process)
        self.threads = self.cpu_threads.count
        self._layers: OrderedDict[bytes, bytes] = OrderedDict()

    def notes(self) -> tuple[str, ...]:
        """Nothing to say of the choice: there is one runtime on the CPU."""
        return ()

    def observations(self) -> tuple[str, ...]:
        """Nothing is watched on the CPU but the reference kernel."""
        return ()

    def provenance(self) -> dict[str, str | int]:
        """What a measurement here depends on."""
        name, features = cpu_identity()
        return {
            "device": name,
            "cpu_features": features,
            "driver": "none",
            "runtime": self.name,
            "runtime_version": ort.__version__,
            "provider": "CPUExecutionProvider",
            "precision": "fp32",
            "batch_size": self.batch_size,
            "threads": self.threads,
        }

    def renew(self) -> None:
        """Nothing outlasts a session but this process."""

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        """A session on the whole model, with random inputs."""
        with self._runner(model, self.cpu_threads.options()) as runner:
            yield runner

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        """A session on one layer without the layout changes at its ends.

        Inside a network, convolutions hand each other blocked tensors (NCHWc); alone, each would
        be wrapped in a reorder to that layout and one back, which for a 7x7 stem is half of the
        time. So the layer is optimized first, as the runtime would, and the reorders cut off.
        """
        key = hashlib.sha256(model).digest()
        if key not in self._layers and not _convolves(model):
            with self.open(model) as runner:  # nothing that a linear layer hands on is blocked
                yield runner
            return
        options = self.cpu_threads.options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with self._runner(self._as_inside(key, model), options) as runner:
            yield runner

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """First output of the model on ``inputs`` (N, C, H, W)."""
        session = self.cpu_threads.session(model, self.cpu_threads.options())
        return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])

    @contextmanager
    def _runner(self, model: bytes | Path, options: ort.SessionOptions) -> Iterator[Runner]:
        session = self.cpu_threads.session(model, options)
        rng = np.random.default_rng(0)
        feeds = {
            i.name: np.resize(
                rng.standard_normal(NOISE, dtype=np.float32),
                input_shape(i.name, i.shape, self.batch_size),
            )
            for i in session.get_inputs()
        }
        yield Runner(lambda: session.run(None, feeds), watch=HostWatch())

    def _as_inside(self, key: bytes, model: bytes) -> bytes:
        """A layer optimized and without reorders; made once for its rounds in this process."""
        if key not in self._layers:
            ready = without_reorders(self._optimized(model))
            if len(ready) > LAYER_BYTES:
                return ready
            self._layers[key] = ready
            while sum(map(len, self._layers.values())) > KEPT_BYTES:
                self._layers.popitem(last=False)
        self._layers.move_to_end(key)
        return self._layers[key]

    def _optimized(self, model: bytes) -> onnx.ModelProto:
        import onnx  # here: a worker that times whole networks starts faster without it

        with tempfile.TemporaryDirectory() as folder:
            options = self.cpu_threads.options()
            options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
            self.cpu_threads.session(model, options)
            return onnx.load(options.optimized_model_filepath)


def _convolves(model: bytes) -> bool:
    import onnx  # here: a worker that times whole networks starts faster without it

    return any(node.op_type == "Conv" for node in onnx.load_from_string(model).graph.node)


def without_reorders(model: onnx.ModelProto) -> bytes:
    """Serialized copy of an optimized one-layer model that takes and gives blocked tensors.

    A model in which the runtime chose the plain layout comes back as it is.
    """
    graph = model.graph
    renamed: dict[str, str] = {}
    outputs = {o.name for o in graph.output}
    for node in graph.node:
        if node.domain == NCHWC_DOMAIN and node.op_type == "ReorderInput":
            renamed[node.output[0]] = node.input[0]
        elif node.op_type == "ReorderOutput" and node.output[0] in outputs:
            renamed[node.input[0]] = node.output[0]
    kept = [n for n in graph.node if n.op_type not in ("ReorderInput", "ReorderOutput")]
    for node in kept:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    _pad_input_channels(graph, kept, set(renamed.values()))
    del graph.node[:]
    graph.node.extend(kept)
    del graph.value_info[:]
    return model.SerializeToString()


def _pad_input_channels(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], names: set) -> None:
    """Blocked tensors hold whole blocks: give the inputs the channels that the weights expect."""
    weights = {i.name: i.dims for i in graph.initializer}
    shapes = {i.name: i.type.tensor_type.shape for i in graph.input}
    for node in nodes:
        if node.domain == NCHWC_DOMAIN and node.op_type == "Conv" and node.input[0] in names:
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            shapes[node.input[0]].dim[1].dim_value = weights[node.input[1]][1] * groups
