"""The DSA step gives the device work and never waits for it: shown without a device.

On CUDA a host that reads a tensor's value waits for everything before it. Reading shows as one of
a few operations whatever the device is, so the step runs on the CPU with those forbidden. And it
runs on the meta device, where a tensor of the CPU among its operands shows as one does on CUDA: as
an error, a copy to the device, or a number that a CUDA graph would keep for ever.
"""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from conftest import Residual
from fake_device import FakeDevice
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsa_hw.cost.counted import FlopsBudget, MemoryBudget
from dsa_hw.cost.latency.budget import LatencyBudget
from dsa_hw.cost.latency.profiling import profile_network
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.inventory import take_inventory
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.runs.config import PruneConfig
from dsa_hw.search.dpp import keep_probabilities, sample_masks, standardized_inexactness
from dsa_hw.search.settings import SearchSettings
from dsa_hw.training.schedule import make_optimizer
from dsa_hw.training.trainer import unwaited
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


class OneDevice(TorchDispatchMode):
    """No operation takes tensors of the CPU beside those of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = {
            leaf.device.type
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, Tensor)
        }
        if len(found) > 1 and not in_optimizer():
            raise HostSync(f"{func._schema.name} of tensors on {' and '.join(sorted(found))}")
        return func(*args, **(kwargs or {}))


class NothingMadeByTheHost(TorchFunctionMode):
    """No tensor is made of the host's numbers: on CUDA that is a copy which is waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy) and not in_optimizer():
            raise HostSync(f"torch.{func.__name__}")
        return func(*args, **(kwargs or {}))


class ToDevice:
    """Moves every tensor that an object holds, at any depth, to another device, in place.

    Stands in for building the object there: a search cannot be built from tensors without values.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: dict[int, object] = {}

    def tensor(self, value: Tensor) -> Tensor:
        """The same one for the same one."""
        if id(value) not in self._tensors:
            moved = value.detach().to(self._device)
            if isinstance(value, nn.Parameter):
                moved = nn.Parameter(moved, value.requires_grad)
            elif value.is_leaf:
                moved.requires_grad_(value.requires_grad)
            self._tensors[id(value)] = (value, moved)  # the key's object must live on
        return self._tensors[id(value)][1]

    def __call__(self, value: Any) -> Any:
        """``value`` itself with moved contents, or what takes its place."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, torch.device):
            return torch.device(self._device)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(self, value))
        if id(value) in self._seen or isinstance(value, (type, ModuleType)):
            return value
        self._seen[id(value)] = value
        if isinstance(value, list):
            value[:] = map(self, value)
        elif isinstance(value, dict):
            # PyTorch's optimizers keep their step counts on the host, whatever the device.
            items = [(self(k), v if k == "step" else self(v)) for k, v in value.items()]
            value.clear()
            value.update(items)
        elif isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                cell.cell_contents = self(cell.cell_contents)
        elif type(value).__module__.startswith(("dsa_hw", "conftest", "torch.nn", "torch.optim")):
            for name in self._names(value):
                found = getattr(value, name)
                if (moved := self(found)) is not found:
                    object.__setattr__(value, name, moved)
        return value

    @staticmethod
    def _names(value: Any) -> list[str]:
        slots = [n for c in type(value).__mro__ for n in getattr(c, "__slots__", ())]
        return [*getattr(value, "__dict__", {}), *(n for n in slots if hasattr(value, n))]


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x * torch.full((), 2.0),
        lambda x: torch.maximum(x, torch.full((), 0.5)),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x[torch.arange(2)],
        lambda x: torch.where(x > 0, x, torch.zeros(())),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_the_detector_sees_tensors_of_the_host(mixing: Any) -> None:
    with pytest.raises(HostSync), NothingMadeByTheHost(), OneDevice():
        mixing(torch.ones(3, device="meta"))
    with OneDevice():
        torch.ones(3, device="meta").clamp_max(1.0)


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
    ("masks", "autocast", "remove_branches"),
    [
        ("soft", False, False),
        ("sampled", True, False),
        ("hard", False, True),
        ("sampled", True, True),
    ],
)
def test_a_search_step_never_reads_a_value(
    table: LatencyTable, masks: Any, autocast: bool, remove_branches: bool
) -> None:
    torch.manual_seed(0)
    model, criterion = Residual(), nn.CrossEntropyLoss()
    budgets = [LatencyBudget(table, 0.045), FlopsBudget(0.5)]
    steps = 8
    settings = SearchSettings(warmup=(0.0, 0.0), validation_every=2, log_every=10**6, masks=masks)
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


@pytest.mark.parametrize(
    ("constraint", "importance"),
    [
        ("projection", "bn_scale"), ("projection", "taylor"), ("admm", "filter_l1"),
    ],
)  # fmt: skip
def test_a_search_step_takes_nothing_from_the_host(
    table: LatencyTable, constraint: Any, importance: Any
) -> None:
    """Forward, backward, both optimizers, masks and the move of the keep ratios."""
    torch.manual_seed(0)
    model, criterion = Residual(), nn.CrossEntropyLoss()
    budgets = [LatencyBudget(table, 0.045), FlopsBudget(0.5), MemoryBudget(0.9)]
    settings = SearchSettings(
        warmup=(0.0, 0.0), validation_every=2, log_every=10**6, constraint=constraint
    )
    pruner = DSAPruner(model, torch.zeros(1, 3, 16, 16), budgets, total_steps=16,
                       settings=settings, importance=importance)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batch = [torch.randn(8, 3, 16, 16), torch.randint(10, (8,))]

    def loss() -> Tensor:
        return criterion(model(batch[0]).float(), batch[1])

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(validation_loss=loss)

    while not pruner.searching:
        step()
    for _ in range(4):  # everything that is made at its first use is there
        step()
    move = ToDevice("meta")
    for holder in (model, pruner, optimizer, batch):
        move(holder)
    with NothingMadeByTheHost(), OneDevice():
        for _ in range(4):
            step()
    for tensor in (*model.parameters(), *model.buffers(), pruner.keep_ratios):
        assert tensor.device.type == "meta"


def test_budgets_and_masks_are_made_on_the_device_that_asks(table: LatencyTable) -> None:
    """Tensors of a CUDA device that need none: mixing devices or reading a value raises."""
    model, x = Residual(), torch.zeros(1, 3, 16, 16)
    graph = take_inventory(model, x, remove_branches=True)
    assert graph.branches
    requests = (LatencyBudget(table, 0.045), FlopsBudget(0.5), MemoryBudget(0.5))
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


@pytest.mark.parametrize("importance", ["bn_scale", "taylor"])
@pytest.mark.parametrize("remove_branches", [False, True])
def test_a_captured_training_step_sees_every_new_mask(
    table: LatencyTable, importance: Any, remove_branches: bool
) -> None:
    """A CUDA graph of the step reads masks, and adds to their gradients, by address."""
    torch.manual_seed(0)
    model, criterion = Residual(), nn.CrossEntropyLoss()
    settings = SearchSettings(
        warmup=(0.0, 0.0), validation_every=1, log_every=10**6, mask_training=True
    )
    pruner = DSAPruner(
        model, torch.zeros(1, 3, 16, 16), LatencyBudget(table, 0.045), total_steps=16,
        settings=settings, importance=importance, remove_branches=remove_branches,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))

    def loss() -> Tensor:
        return criterion(model(x), y)

    seen: list[tuple[list[int], list[Tensor]]] = []
    for _ in range(6):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        pruner.step(validation_loss=loss)
        if pruner.searching:
            store = pruner._masks.store
            masks = [store.of(layer) for layer in range(len(store.indices))]
            there = [m for m in masks if m is not None]
            if store.gates is not None and store.gates.grad is not None:
                there.append(store.gates.grad)
            seen.append(([m.data_ptr() for m in there], [m.detach().clone() for m in there]))
    places, values = zip(*seen[1:], strict=True)  # gradients are made by the first backward
    assert len(values) >= 3
    assert len(places[0]) == len(store.indices) + (importance == "taylor")
    assert set(map(tuple, places)) == {tuple(places[0])}
    assert not all(torch.equal(a, b) for a, b in zip(values[0], values[-1], strict=True))


def test_batches_reach_the_card_without_waiting() -> None:
    """A copy from memory that is not pinned waits for all work before it."""
    log: list[str] = []

    class Batch:
        device = torch.device("cpu")

        def __init__(self, pinned: bool) -> None:
            self.pinned = pinned

        def is_pinned(self) -> bool:
            return self.pinned

        def pin_memory(self) -> Batch:
            log.append("pinned")
            return Batch(True)

        def to(self, device: torch.device, non_blocking: bool) -> None:
            assert non_blocking
            assert self.pinned or device.type == "cpu"
            log.append(device.type)

    for pinned, device in ((False, "cuda"), (True, "cuda"), (False, "cpu")):
        batch: Any = Batch(pinned)
        unwaited(batch, torch.device(device))
    assert log == ["pinned", "cuda", "cuda", "cpu"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_card_decides_by_itself_to_skip_a_step(optimizer: Any) -> None:
    """The scaler of float16 gradients reads on the host whether to step, but for fused ones."""
    config = PruneConfig(target_ratio=0.5, optimizer=optimizer)
    here = make_optimizer(nn.Linear(2, 2), config)
    with FakeTensorMode():
        there = make_optimizer(nn.Linear(2, 2, device="cuda"), config)
    assert getattr(there, "_step_supports_amp_scaling", False)
    assert not getattr(here, "_step_supports_amp_scaling", False)
