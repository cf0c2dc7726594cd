"""Channels are followed through whatever a network does with them; what is not known stays."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_norms
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from dsa_hw.cost.counted import count, flops_budget, params_budget
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.dry_cut import random_keep
from dsa_hw.network.forward import arguments_of, output_tensors
from dsa_hw.network.inventory import take_inventory
from dsa_hw.network.masks import ChannelMasks, hard_masks
from dsa_hw.network.removal import kept_widths, remove_channels
from dsa_hw.surgery.saved import load_pruned, save_pruned

SIZE = 8


class Net(nn.Module):
    """24 channels of a convolution with a batch-norm, something, and a 1x1 layer that reads."""

    OUTS = 24

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.make()
        self.last = nn.Conv2d(self.OUTS, 12, 1)
        self.head = nn.Conv2d(12, 4, 1)

    def make(self) -> None:
        """Layers of the body."""

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(self.body(torch.relu(self.norm(self.stem(x)))))))


class Flattened(Net):
    """(H, W, C) flattening: each channel is read at every pixel."""

    def make(self) -> None:
        self.wide = nn.Linear(24 * SIZE * SIZE, 24)

    def body(self, x: Tensor) -> Tensor:
        return self.wide(x.permute(0, 2, 3, 1).flatten(1))[:, :, None, None]


class C2f(Net):
    """YOLOv8's block."""

    OUTS = 36

    def make(self) -> None:
        self.deep = nn.Conv2d(12, 12, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a, b, torch.relu(self.deep(b))], 1)


class Shuffle(Net):
    """ShuffleNet's shuffle of three parts."""

    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


class PixelShuffle(Net):
    OUTS = 6

    def body(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


class GatedUnit(Net):
    """Half of the channels times a gate of the other half."""

    OUTS = 12

    def body(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


class SqueezeExcite(Net):
    """With linear layers and a view, as most repositories write it."""

    def make(self) -> None:
        self.down, self.up = nn.Linear(24, 8), nn.Linear(8, 24)

    def body(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * gate.view(n, c, 1, 1)


class SpatialAttention(Net):
    """CBAM's: a mean over channels would be another one."""

    def make(self) -> None:
        self.map = nn.Conv2d(1, 1, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.map(x.mean(1, keepdim=True)))


class SpatialGate(Net):
    """One channel for all pixels, which any number of channels can be multiplied with."""

    def make(self) -> None:
        self.map = nn.Conv2d(24, 1, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.map(x))


class UpAndDown(Net):
    """Resizing to another map's size, and a concatenation."""

    OUTS = 40

    def make(self) -> None:
        self.down = nn.Conv2d(24, 16, 3, 2, 1)

    def body(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.interpolate(self.down(x), size=x.shape[2:])], 1)


class Mlp(Net):
    """Tokens, a layer-norm and an MLP with a scale for each of its outputs."""

    def make(self) -> None:
        self.pre, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)
        self.scale = nn.Parameter(torch.full((24,), 0.7))

    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.scale * self.down(F.gelu(self.up(self.pre(tokens))))
        return tokens.transpose(1, 2).reshape(x.shape)


class Prelu(Net):
    """One slope for all channels."""

    def make(self) -> None:
        self.slope = nn.PReLU()

    def body(self, x: Tensor) -> Tensor:
        return self.slope(-x)


class Twice(Net):
    """One head for two levels."""

    def make(self) -> None:
        self.again = nn.Conv2d(24, 24, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.again(x)))


ALONE = "no layer that reads them"
CUT = {
    Flattened: {}, C2f: {}, Shuffle: {}, PixelShuffle: {}, GatedUnit: {}, SqueezeExcite: {},
    UpAndDown: {}, Prelu: {}, Twice: {}, SpatialGate: {"map": ALONE},
    Mlp: {"stem": r"pre \(layer-norm\) computes over all of them"},
    SpatialAttention: {"stem": r"computes over all of them \(mean\)", "map": ALONE},
}  # fmt: skip
"""What stays in each, and why; all else is cut."""


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(kind()).eval()


@pytest.mark.parametrize("kind", CUT, ids=lambda kind: kind.__name__)
def test_everything_else_is_cut_and_computes_the_same(kind: type[nn.Module]) -> None:
    model, x = seeded(kind), torch.randn(1, 3, SIZE, SIZE)
    coupling = take_inventory(model, x).coupling
    stays = {g.name: g.frozen for g in coupling.groups if g.frozen and g.frozen != "network output"}
    assert stays.keys() == CUT[kind].keys()
    assert all(re.search(CUT[kind][name], str(stays[name])) for name in stays)

    model = model.double()
    keep = random_keep(coupling, np.random.default_rng(3))
    small = remove_channels(model, coupling, keep)
    again = _zeroed(model, coupling, keep, x.double())
    for one, other in zip(output_tensors(small, x.double()), again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def _zeroed(model: nn.Module, coupling, keep, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs with every channel that goes set to zero where a layer or a norm makes it."""
    handles = []
    for (name, side), mapping in coupling.maps.items():
        if side != "out":
            continue
        stays = torch.zeros(len(mapping.group), dtype=torch.bool)
        stays[mapping.kept(keep)] = True
        module = model.get_submodule(name)
        shape = (-1,) if isinstance(module, nn.Linear) else (1, -1, 1, 1)

        def hook(module, inputs, output, stays=stays, shape=shape):
            return output * stays.view(shape)

        handles.append(module.register_forward_hook(hook))
    try:
        return output_tensors(model, x)
    finally:
        for handle in handles:
            handle.remove()


class GroupNormed(Net):
    def make(self) -> None:
        self.group = nn.GroupNorm(4, 24)

    def body(self, x: Tensor) -> Tensor:
        return self.group(x)


class UpSampled(Net):
    def make(self) -> None:
        self.up = nn.ConvTranspose2d(24, 24, 2, 2)

    def body(self, x: Tensor) -> Tensor:
        return self.up(x)


class FixedParts(Net):
    def body(self, x: Tensor) -> Tensor:
        a, b = x.split([8, 16], 1)
        return torch.cat([b, a], 1)


class Slice(Net):
    OUTS = 10

    def body(self, x: Tensor) -> Tensor:
        return x[:, :10]


class Position(Net):
    def make(self) -> None:
        self.position = nn.Parameter(torch.randn(1, 24, SIZE, SIZE))

    def body(self, x: Tensor) -> Tensor:
        return x + self.position


class Recurrent(Net):
    OUTS = 20

    def make(self) -> None:
        self.rnn = nn.LSTM(24, 20, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        return self.rnn(x.mean(2).transpose(1, 2))[0].transpose(1, 2)[:, :, None]


class Standardized(Net):
    def make(self) -> None:
        self.kernel = nn.Parameter(torch.randn(24, 24, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel / self.kernel.norm())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (GroupNormed, r"group \(group-norm\) computes over groups of them"),
        (UpSampled, r"up \(ConvTranspose2d\) takes them"),
        (FixedParts, "splits them into parts of fixed size"),
        (Slice, "slice of fixed size"),
        (Position, r"a parameter outside of .* \(position, shape \(1, 24, 8, 8\)\)"),
        (Recurrent, r"rnn takes them \(lstm\)"),
        (Standardized, "computes the weights that they meet"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_is_not_known_stays_and_the_rest_goes_on(kind: type[nn.Module], reason: str) -> None:
    model, x = seeded(kind), torch.randn(1, 3, SIZE, SIZE)
    groups = {g.name: g.frozen for g in find_coupling(model, x).groups}
    assert re.search(reason, str(groups["stem"])), groups["stem"]
    assert groups["last"] is None


class FrozenNorms(Net):
    """torchvision's norm of detectors' backbones: numbers in buffers, none in parameters."""

    def make(self) -> None:
        self.deep, self.fixed = nn.Conv2d(24, 24, 3, padding=1), FrozenBatchNorm2d(24)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.fixed(self.deep(x)))


def test_a_frozen_norm_goes_with_its_channels() -> None:
    torch.manual_seed(0)
    model, x = FrozenNorms(), torch.randn(1, 3, SIZE, SIZE)
    for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_var", 0.5, 2.0)):
        model.fixed.get_buffer(name).uniform_(low, high)
    coupling = take_inventory(model, x).coupling
    assert {g.name for g in coupling.groups if g.frozen} == {"head"}
    keep = random_keep(coupling, np.random.default_rng(1))
    small = remove_channels(model, coupling, keep)
    stem = int(keep[[g.name for g in coupling.groups].index("stem")].sum())
    fixed = small.get_submodule("fixed")
    assert all(len(buffer) == stem for buffer in fixed.buffers())
    assert small.eval()(x).shape == (1, 4, SIZE, SIZE)


class Auxiliary(Net):
    """A head that runs in training alone."""

    def make(self) -> None:
        self.aux = nn.Sequential(nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor):
        x = torch.relu(self.norm(self.stem(x)))
        scores = self.head(torch.relu(self.last(x)))
        return (scores, self.aux(x)) if self.training else scores


def test_an_auxiliary_head_is_cut_with_what_it_reads() -> None:
    model, x = seeded(Auxiliary), torch.randn(2, 3, SIZE, SIZE)
    coupling = take_inventory(model, x).coupling
    reasons = {g.name: g.frozen for g in coupling.groups}
    assert reasons["stem"] is None
    assert reasons["aux.0"] == "they are made in training alone"
    keep = random_keep(coupling, np.random.default_rng(1))
    small = remove_channels(model, coupling, keep).train()
    scores, early = small(x)
    assert scores.shape == early.shape == (2, 4, SIZE, SIZE)


class Untraceable(Auxiliary):
    """What it does in training depends on values."""

    def forward(self, x: Tensor):
        if self.training and float(x.sum()) > 0:
            x = x + 1
        return super().forward(x)


def test_an_auxiliary_head_that_cannot_be_traced_is_told() -> None:
    model, x = seeded(Untraceable), torch.randn(2, 3, SIZE, SIZE)
    with pytest.warns(UserWarning, match=r"aux\.0, aux\.2 do not run in evaluation mode"):
        coupling = find_coupling(model, x)
    assert all(not name.startswith("aux") for name, _ in coupling.maps)


class Signal(nn.Module):
    """Convolutions of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(3, 16, 5, 2, 2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(2))


def test_convolutions_of_one_dimension_are_rows_of_an_image() -> None:
    torch.manual_seed(0)
    graph = take_inventory(Signal(), torch.randn(1, 3, 40))
    assert {g.name for g in graph.coupling.groups if g.frozen is None} == {"layers.0", "layers.3"}
    first = graph.layers[0].spec
    assert (first.kernel, first.stride, first.pads) == ((1, 5), (1, 2), (0, 2, 0, 2))
    assert first.size == (1, 40)
    macs = 3 * 16 * 5 * 20 + 16 * 8 * 3 * 18 + 8 * 4
    assert count(flops_budget(graph, 1.0), graph.dense_widths) == 2 * macs


def test_what_no_row_can_be_of_counts_in_flops_all_the_same() -> None:
    """A grouped convolution of unequal groups' widths keeps its channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU(),
        nn.Conv2d(12, 24, 1, groups=4), nn.ReLU(), nn.Conv2d(24, 4, 1),
    )  # fmt: skip
    graph = take_inventory(model, torch.randn(1, 3, 5, 5))
    reasons = {g.name: g.frozen for g in graph.coupling.groups}
    assert reasons["0"] is None
    assert str(reasons["2"]).startswith("4 makes or takes them: a grouped convolution from 12")
    weights = 3 * 16 + 16 * 12 + 3 * 24 + 24 * 4
    assert count(params_budget(graph, 1.0), graph.dense_widths) == weights
    assert count(flops_budget(graph, 1.0), graph.dense_widths) == 2 * weights * 25


def test_a_checkpoint_under_masks_has_the_network_s_names() -> None:
    model, x = seeded(C2f), torch.randn(1, 3, SIZE, SIZE)
    coupling = take_inventory(model, x).coupling
    names = set(model.state_dict())
    masks = ChannelMasks(model, coupling, x)
    masks.set(*hard_masks(coupling, (), random_keep(coupling, np.random.default_rng(0))))
    state = model.state_dict()
    assert set(state) == names
    seeded(C2f).load_state_dict(state)
    changed = {name: value + 1 for name, value in state.items()}
    model.load_state_dict(changed)
    masks.remove()
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    seeded(C2f).load_state_dict(model.state_dict())


class TwoInputs(nn.Module):
    """Two images through one trunk; a dictionary comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mix = nn.Conv2d(3, 16, 3), nn.Conv2d(32, 12, 1)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = torch.relu(self.trunk(x)), torch.relu(self.trunk(y))
        mixed = torch.relu(self.mix(torch.cat([a, b], 1)))
        return {"scores": self.head(mixed.mean((2, 3))), "map": mixed.mean(1)}


def test_several_inputs_and_a_dictionary(tmp_path) -> None:
    torch.manual_seed(0)
    model, inputs = TwoInputs().eval(), (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    graph = take_inventory(model, inputs)
    free = {g.name for g in graph.coupling.groups if g.frozen is None}
    assert free == {"trunk"}
    keep = random_keep(graph.coupling, np.random.default_rng(0))
    small = remove_channels(model, graph.coupling, keep)
    assert len(output_tensors(small, inputs)) == 2
    assert graph.resized(kept_widths(graph.coupling, keep))
    save_pruned(tmp_path, small, graph.coupling, keep, inputs)
    again = load_pruned(TwoInputs(), tmp_path).eval()
    expected, got = (output_tensors(one, inputs) for one in (small, again))
    assert len(arguments_of(inputs)) == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
