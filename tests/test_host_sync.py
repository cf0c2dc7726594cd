"""The DSA step gives the device work and never waits for it: shown without a device.

On CUDA a host that reads a tensor's value waits for everything before it. Reading shows as one of
a few operations whatever the device is, so the step runs on the CPU with those forbidden.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import Residual
from fake_device import FakeDevice
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_hw.budgets import FlopsBudget, LatencyBudget, MemoryBudget
from dsa_hw.coupling import find_coupling
from dsa_hw.deployed import DeployedGraph, export_onnx
from dsa_hw.dpp import keep_probabilities, sample_masks, standardized_inexactness
from dsa_hw.inventory import take_inventory
from dsa_hw.profiling import profile_network
from dsa_hw.search import DSAPruner, SearchSettings
from profilers.collect import nominal_reference_ms
from profilers.table import LatencyTable

READING_METHODS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "__bool__", "__float__",
    "__int__", "__index__", "__array__", "unique", "argwhere", "equal", "allclose",
}  # fmt: skip
READING_OPERATORS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2",
    "repeat_interleave", "bincount",
}  # fmt: skip


class HostSync(AssertionError):
    """The host asked for a value."""


def in_optimizer() -> bool:
    """Whether PyTorch's optimizer asks: it keeps its step counts on the host."""
    frame = sys._getframe(1)
    while frame is not None:
        if "torch/optim" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class NoReadingMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING_METHODS and not in_optimizer():
            raise HostSync(f"Tensor.{name}")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index):
                raise HostSync("indexing by a boolean tensor")
        return func(*args, **(kwargs or {}))


class NoReadingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READING_OPERATORS and not in_optimizer():
            raise HostSync(name)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise HostSync("index by a boolean tensor")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: torch.nonzero(x),
        lambda x: x.cpu().numpy(),
    ],
)
def test_the_detector_sees_host_syncs(reading: Any) -> None:
    with pytest.raises(HostSync), NoReadingMethods(), NoReadingOperators():
        reading(torch.ones(3))


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    model, x = Residual(), torch.zeros(1, 3, 16, 16)
    graph = DeployedGraph(export_onnx(model, x), find_coupling(model, x))
    device = FakeDevice()
    header = dict(device.provenance()) | {"reference_ms": nominal_reference_ms(device)}
    table = LatencyTable(header)
    profile_network(graph, device, table, networks=8, rounds=2)
    return table


@pytest.mark.parametrize(
    ("stochastic", "autocast", "remove_branches"),
    [(False, False, False), (True, True, False), (False, False, True), (True, True, True)],
)
def test_a_search_step_never_reads_a_value(
    table: LatencyTable, stochastic: bool, autocast: bool, remove_branches: bool
) -> None:
    torch.manual_seed(0)
    model, criterion = Residual(), nn.CrossEntropyLoss()
    budgets = [LatencyBudget(table, 0.02), FlopsBudget(0.5)]
    steps = 8
    settings = SearchSettings(
        warmup=(0.0, 0.0), validation_every=2, log_every=10**6, stochastic=stochastic
    )
    pruner = DSAPruner(model, torch.zeros(1, 3, 16, 16), budgets, total_steps=steps,
                       settings=settings, remove_branches=remove_branches)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return criterion(model(x).float(), y)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(validation_loss=loss)

    while not pruner.searching:  # the warm-up watches the loss, and reads it now and then
        step()
    with NoReadingMethods(), NoReadingOperators():
        for _ in range(4):
            step()
    assert pruner.keep_ratios.min() < 1.0  # it has moved


def test_budgets_and_masks_are_made_on_the_device_that_asks(table: LatencyTable) -> None:
    """Tensors of a CUDA device that need none: mixing devices or reading a value raises."""
    model, x = Residual(), torch.zeros(1, 3, 16, 16)
    graph = take_inventory(model, x, remove_branches=True)
    assert graph.branches
    requests = (LatencyBudget(table, 0.02), FlopsBudget(0.5), MemoryBudget(0.5))
    bound = [request.bind(graph)[0] for request in requests]
    groups = len(graph.dense_widths)
    with FakeTensorMode(), torch.no_grad():  # a backward pass would need the device itself
        widths = torch.full((groups,), 16.0, device="cuda")
        for budget in bound:
            assert budget.to("cuda").cost(widths).device.type == "cuda"
        scores = torch.zeros(groups, 8, device="cuda")
        present = torch.ones(groups, 8, dtype=torch.bool, device="cuda")
        ratios = torch.full((groups,), 0.5, device="cuda")
        beta2 = standardized_inexactness(scores, present, 4.0)
        masks = sample_masks(keep_probabilities(ratios, scores, present, beta2))
        assert masks.device.type == "cuda"
