"""The inventory knows what can be cut, and says why the rest is frozen or refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import randomize_norms
from torch import Tensor, nn

from dsa_hw.errors import UnsupportedModel
from dsa_hw.network.channel_flow import NETWORK_OUTPUT
from dsa_hw.network.coupling import ChannelMap, Coupling, find_coupling
from dsa_hw.network.dry_cut import random_keep
from dsa_hw.network.forward import outputs_of
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.inventory import frozen_note, take_inventory
from dsa_hw.network.masks import ChannelMasks, hard_masks
from dsa_hw.network.removal import remove_channels


class Block(nn.Module):
    """A convolution with a batch-norm."""

    def __init__(self, ins: int, outs: int, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Headed(nn.Module):
    """A stem, what a subclass does, and a linear head on what comes out (24 channels)."""

    def __init__(self, outs: int = 24) -> None:
        super().__init__()
        self.stem = Block(3, 16)
        self.last = Block(outs, 20)
        self.head = nn.Linear(20, 7)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.stem(x)))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class SumWithConcatenation(Headed):
    """relu(bn(B(x)) + cat(A(x), C(x))): B's channels are a sum of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(16, 8), Block(16, 24), Block(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(x) + torch.cat([self.a(x), self.c(x)], 1))


class Halves(Headed):
    """A chunk: both parts lose equally many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.left = Block(16, 24), Block(12, 12)

    def body(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.wide(x)).chunk(2, 1)
        return torch.cat([self.left(a), b], 1)


class Pieces(Headed):
    """Parts whose sizes are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.left = Block(16, 24), Block(8, 8)

    def body(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.wide(x)).split([8, 16], 1)
        return torch.cat([self.left(a), b], 1)


class Shuffled(Headed):
    """A channel shuffle, which is a reshape and a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Block(16, 24)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(x))
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Tokens(Headed):
    """Linear layers on (N, T, C), which PyTorch exports as matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.up, self.down = Block(16, 24), nn.Linear(24, 48), nn.Linear(48, 24)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(x))
        tokens = self.down(torch.relu(self.up(x.flatten(2).transpose(1, 2))))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class Twice(Headed):
    """One module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.again = Block(16, 24), Block(24, 24)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(x))
        return torch.relu(self.again(torch.relu(self.again(x)))) + x


class ReadTwice(Headed):
    """A convolution that a batch-norm reads, and another convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.bn = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.side = Block(24, 24)

    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return torch.relu(self.bn(x)) + self.side(x)


class OutputInside(Headed):
    """A feature map that is read further and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Block(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        scores = self.head(torch.relu(self.last(x)).mean((2, 3)))
        return torch.cat([scores, x.mean((2, 3))], 1)


class TwoAlike(Headed):
    """Two small layers whose last batch-norms are zero: folded, their weights are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one, self.two = Block(16, 24), Block(24, 24, 1), Block(24, 24, 1)
        for block in (self.one, self.two):
            nn.init.zeros_(block.bn.weight)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(x))
        x = torch.relu(x + self.one(x))
        return torch.relu(x + self.two(x))


class Normalised(Headed):
    """A normalisation that cannot be made smaller yet."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Conv2d(16, 24, 3), nn.GroupNorm(4, 24)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.wide(x)))


def inventory(model: nn.Module, **options: object) -> tuple[DeployedGraph, Tensor]:
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return take_inventory(model, x, **options), x  # pyright: ignore[reportArgumentType]


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def reasons(graph: DeployedGraph) -> dict[str, str]:
    return {g.name: g.frozen for g in graph.coupling.groups if g.frozen}


def check_cut(model: nn.Module, coupling: Coupling, x: Tensor, seed: int = 5) -> None:
    """A cut network computes what the masked one computes."""
    keep = random_keep(coupling, np.random.default_rng(seed))
    masks = ChannelMasks(model, coupling, x)
    masks.set(*hard_masks(coupling, (), keep))
    masked = outputs_of(model, x)
    masks.remove()
    cut = outputs_of(remove_channels(model, coupling, keep), x)
    # float32 sums in another order: about 1e-6 of the outputs' spread in networks this shallow
    assert float((masked - cut).abs().max()) <= 1e-4 * float(masked.std())


@pytest.mark.parametrize("kind", [SumWithConcatenation, Twice, ReadTwice, Halves, Shuffled, Tokens])
def test_what_can_be_cut_is_cut(kind: type[nn.Module]) -> None:
    model = randomize_norms(built(kind))
    graph, x = inventory(model)
    assert reasons(graph) == {"head": "network output"}
    check_cut(model, graph.coupling, x)


def test_a_sum_with_a_concatenation_is_two_groups() -> None:
    graph, _ = inventory(built(SumWithConcatenation))
    widths = {g.name: (g.dense_width, g.layers) for g in graph.coupling.groups}
    assert widths["a.conv"] == (8, ("a.conv", "b.conv"))
    assert widths["c.conv"] == (16, ("b.conv", "c.conv"))
    b = next(layer for layer in graph.layers if layer.name == "b.conv")
    some = [g.dense_width // 2 if g.name == "a.conv" else g.dense_width for g in
            graph.coupling.groups]  # fmt: skip
    assert b.cout(some) == pytest.approx(4 + 16)


@pytest.mark.parametrize(
    ("kind", "frozen", "reason"),
    [
        (Pieces, "wide.conv", "the network splits them into parts of fixed size"),
        (Normalised, "wide", r"norm \(group-norm\)"),
    ],
)
def test_what_cannot_be_cut_is_frozen_and_says_why(
    kind: type[nn.Module], frozen: str, reason: str
) -> None:
    model = randomize_norms(built(kind))
    graph, x = inventory(model)
    found = reasons(graph)
    assert any(name.startswith(frozen) and re.search(reason, why) for name, why in found.items())
    assert "stem.conv" not in found
    assert frozen in frozen_note(graph)[0]
    check_cut(model, graph.coupling, x)


def test_a_feature_map_that_is_an_output_too_keeps_its_channels() -> None:
    model = randomize_norms(built(OutputInside))
    graph, x = inventory(model)
    assert {"wide.conv", "head"} <= set(reasons(graph))
    check_cut(model, graph.coupling, x)


def test_equal_weights_of_two_layers_are_told_apart() -> None:
    graph, _ = inventory(built(TwoAlike))
    names = [layer.name for layer in graph.layers]
    assert names == ["stem.conv", "wide.conv", "one.conv", "two.conv", "last.conv", "head"]


def test_a_network_in_another_memory_format_is_the_same() -> None:
    model = built(SumWithConcatenation)
    there, x = inventory(model)
    last = torch.channels_last
    again = take_inventory(model.to(memory_format=last), x.to(memory_format=last))  # pyright: ignore
    assert again.digest == there.digest


def test_a_shared_module_is_a_layer_at_each_of_its_calls() -> None:
    graph, _ = inventory(built(Twice))
    assert [layer.name for layer in graph.layers].count("again.conv") == 2


def test_excluded_layers_are_frozen_by_name() -> None:
    graph, _ = inventory(built(SumWithConcatenation), exclude=["b.*", "stem.bn"])
    assert reasons(graph) == {
        "stem.conv": "excluded (stem.bn)",
        "a.conv": "excluded (b.conv)",
        "c.conv": "excluded (b.conv)",
        "head": "network output",
    }
    note = frozen_note(graph)[0]
    assert note.startswith("3 of 5 groups of channels keep their width")
    assert "a.conv, c.conv: excluded (b.conv)" in note


def test_a_network_without_anything_to_remove_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"no channels that can be removed.*excluded"):
        inventory(built(SumWithConcatenation), exclude=["*"])


def test_a_wrong_coupling_is_found_and_attributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coupling that confuses two channels of one group: that group is frozen, and no other."""
    from dsa_hw.network import inventory as module

    def confused(model: nn.Module, x: Tensor, exclude: object, program: object) -> Coupling:
        coupling = find_coupling(model, x)
        maps = dict(coupling.maps)
        side = ("last.conv", "out")
        maps[side] = ChannelMap(maps[side].group, np.roll(maps[side].atom, 1))
        return Coupling(coupling.groups, maps)

    monkeypatch.setattr(module, "find_coupling", confused)
    graph, _ = inventory(built(SumWithConcatenation))
    found = reasons(graph)
    assert set(found) == {"last.conv", "head"}
    assert "outputs differ" in found["last.conv"]


def test_a_wrong_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployed graph that has other widths than the network that is cut."""
    right = DeployedGraph.layer_shapes

    def wrong(self: DeployedGraph, widths: object) -> list[tuple[int, ...]]:
        shapes = right(self, widths)  # pyright: ignore[reportArgumentType]
        dense = right(self, self.dense_widths)
        return [d if layer.name == "a.conv" else s for s, d, layer in
                zip(shapes, dense, self.layers, strict=True)]  # fmt: skip

    monkeypatch.setattr(DeployedGraph, "layer_shapes", wrong)
    graph, _ = inventory(built(SumWithConcatenation))
    found = reasons(graph)
    assert "a.conv has weights of shape" in found["a.conv"]
    assert "last.conv" not in found


def test_a_graph_that_is_wrong_as_it_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing may be cut, there is nothing to look for by halving."""
    shapes = [(1,)] * len(inventory(built(SumWithConcatenation))[0].layers)
    monkeypatch.setattr(DeployedGraph, "layer_shapes", lambda self, widths: shapes)
    with pytest.raises(UnsupportedModel, match="no single group of channels is the cause"):
        inventory(built(SumWithConcatenation), exclude=["*"])


LIBRARY = {
    "resnet18": [],
    "regnetx_002": [],
    "skresnet18": ["split"],
    "mixnet_s": ["split"],
}
"""Networks of timm, and for each a word of reasons for which channels stay in it."""


@pytest.mark.parametrize("name", LIBRARY)
def test_networks_of_a_library(name: str) -> None:
    """With their own first weights (last batch-norms are zero), at a size that costs little."""
    timm = pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    graph = take_inventory(model, torch.randn(1, 3, 64, 64))
    found = {why for why in reasons(graph).values() if why != NETWORK_OUTPUT}
    assert bool(found) == bool(LIBRARY[name])
    assert all(any(word in why for why in found) for word in LIBRARY[name])
    free = sum(g.frozen is None for g in graph.coupling.groups)
    assert free >= 8
