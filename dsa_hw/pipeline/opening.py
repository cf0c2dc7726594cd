"""Opening what any command needs: backend, latency table, network, data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsa_hw.data import DataSplits, load_data
from dsa_hw.errors import UserError
from dsa_hw.models import default_input_shape, resolve_model
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.forward import outputs_of
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.inventory import take_inventory
from dsa_hw.pipeline.finished_search import config_of
from dsa_hw.runs.config import DeviceConfig, ModelConfig, PruneConfig
from dsa_hw.runs.folder import RunFolder
from dsa_hw.runs.table_folder import table_folder
from dsa_hw.surgery.saved import refuse_not_finite
from profilers.backends import Backend, open_backend
from profilers.collect import nominal_reference_ms
from profilers.table import LatencyTable, default_path

# -- shared with the other commands ------------------------------------------------------------


def configured_backend(config: DeviceConfig) -> Backend:
    """The backend a configuration asks for."""
    return open_backend(
        config.device,
        backend=config.backend,
        precision=config.precision,
        batch_size=config.batch_size,
        threads=config.threads,
        include_copies=config.include_copies,
    )


def configured_table(config: DeviceConfig, backend: Backend) -> LatencyTable:
    """The table a configuration asks for, ready for more measurements.

    Raises:
        TableError: its file cannot be read, or it was measured under other conditions.
        UserError: its folder cannot be written.
    """
    provenance = backend.provenance()
    path = Path(config.table) if config.table else default_path(provenance, table_folder())
    if path.exists():
        return LatencyTable.open(path, provenance, allow=config.allow_mismatch)
    header = provenance | {
        "reference_ms": nominal_reference_ms(backend),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dsa_hw_version": _own_version(),
        "layers_timed": "as inside a network: batch-norm folded, activation fused, no reorders",
    }
    try:
        return LatencyTable.open(path, header)
    except OSError as error:
        raise UserError(f"cannot write the latency table {path}: {error.strerror}") from error


def _own_version() -> str:
    """The project's version; a checkout that was not installed has none."""
    try:
        return version("dsa-hw")
    except PackageNotFoundError:
        return "not installed"


def unknown_operations_warning(graph: DeployedGraph) -> list[str]:
    """What a user should know of operations that the latency model has no kind of its own for."""
    if not graph.unknown_operations:
        return []
    return [
        f"operations that the latency model does not know ({', '.join(graph.unknown_operations)}) "
        "share one calibrated price an element: look at the held-out error before trusting it"
    ]


def build_model(config: ModelConfig, num_classes: int | None = None) -> nn.Module:
    """The configured network with freshly seeded (or given) weights."""
    torch.manual_seed(config.seed)
    pretrained = isinstance(config, PruneConfig) and config.pretrained
    model = resolve_model(config.model, num_classes=num_classes, pretrained=pretrained)
    if isinstance(config, PruneConfig) and config.weights:
        from safetensors.torch import load_file

        if not Path(config.weights).is_file():
            raise UserError(f"no weights file at {config.weights}")
        try:
            model.load_state_dict(load_file(config.weights))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{config.weights} does not fit {config.model}: {str(error).splitlines()[0]}"
            ) from error
    source = config.weights if isinstance(config, PruneConfig) and config.weights else config.model
    refuse_not_finite(model, source)
    return model


def dense_of_run(folder: RunFolder, result: dict[str, Any]) -> bytes:
    """The dense network of a finished run as ONNX, to be timed: its weights are none in particular.

    Args:
        result: the content of its ``result.json``.

    Raises:
        UserError: the run does not say enough of it.
    """
    if "num_classes" not in result:
        raise UserError(
            f"the run in {folder.path} was made by an earlier version and does not say how its "
            "dense network looks; prune again, or time its model.onnx by itself: --onnx"
        )
    config = replace(config_of(folder), pretrained=False, weights=None)
    model = build_model(config, result["num_classes"])
    example = example_for(config, result["input_shape"])
    return export_onnx(model, example).SerializeToString()


def example_for(config: ModelConfig, shape: tuple[int, int, int] | None = None) -> torch.Tensor:
    """(N, C, H, W) input at the deployment batch size, seeded noise."""
    own = config.input_shape or shape or default_input_shape(config.model)
    if len(own) != 3 or min(own) < 1:
        raise UserError(f"input-shape is {own}; expected channels, height and width")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(config.batch_size, *own, generator=generator)


# -- the run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """The network to prune, as everything after it sees it."""

    model: nn.Module
    example: torch.Tensor
    graph: DeployedGraph
    data: DataSplits | None


def load_dense(config: PruneConfig) -> Dense:
    """Model, data (unless planning) and deployed graph."""
    data = None
    if config.epochs:
        root = Path(config.data_root) if config.data_root else None
        shape = config.input_shape
        data = load_data(
            config.data,
            root,
            input_shape=None if shape is None else (shape[0], shape[1], shape[2]),
            train_size=config.train_size,
            test_size=config.test_size,
        )
    model = build_model(config, data.num_classes if data else None)
    example = example_for(config, data.input_shape if data else None)
    try:
        outputs = outputs_of(model, example)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{config.model} does not run on inputs of shape {tuple(example.shape)}: {error} "
            "(--input-shape asks for another)"
        ) from error
    if data is not None and not isinstance(outputs, torch.Tensor):
        raise UserError(
            f"{config.model} returns a {type(outputs).__name__}; training expects one tensor of "
            "scores (--epochs 0 plans without it, and your own loop takes any outputs)"
        )
    if data is not None and outputs.shape[-1] < data.num_classes:
        raise UserError(
            f"{config.model} has {outputs.shape[-1]} outputs, and the data have "
            f"{data.num_classes} classes; let its factory take num_classes"
        )
    graph = take_inventory(
        model, example, exclude=config.exclude, precision=config.precision,
        remove_branches=config.remove_branches,
    )  # fmt: skip
    return Dense(model, example, graph, data)
