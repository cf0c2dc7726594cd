"""Removing channels equals masking them, for every kind of coupling."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torchvision
from conftest import Residual, randomize_norms
from torch import nn

from dsa_hw.deployment.exported import conv_shapes
from dsa_hw.errors import RunFolderError, UnsupportedModel
from dsa_hw.network.coupling import Coupling, find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.forward import outputs_of
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.inventory import take_inventory
from dsa_hw.network.masks import ChannelMasks
from dsa_hw.network.removal import kept_widths, remove_channels
from dsa_hw.surgery.saved import load_pruned, save_pruned


def random_keep(coupling: Coupling, rng: np.random.Generator) -> list[np.ndarray]:
    """At least one atom of every group; all of a frozen one."""
    keep = []
    for group in coupling.groups:
        kept = rng.random(group.atoms) < 0.6
        kept[rng.integers(group.atoms)] = True
        keep.append(np.ones(group.atoms, bool) if group.frozen else kept)
    return keep


def masked_outputs(
    model: nn.Module, coupling: Coupling, keep: list[np.ndarray], x: torch.Tensor
) -> torch.Tensor:
    masks = ChannelMasks(model, coupling, x)
    stacked = torch.zeros(len(keep), max(g.atoms for g in coupling.groups))
    for row, kept in zip(stacked, keep, strict=True):
        row[: len(kept)] = torch.as_tensor(kept)
    masks.set(stacked)
    outputs = outputs_of(model, x)
    masks.remove()
    return outputs


def timm_model(name: str) -> nn.Module:
    return pytest.importorskip("timm", reason="timm is an optional extra").create_model(name)


MODELS = {
    "residual": (Residual, 16),
    "resnet18": (torchvision.models.resnet18, 64),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 64),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 64),
    "vgg11_bn": (torchvision.models.vgg11_bn, 64),
    "densenet121": (torchvision.models.densenet121, 64),
    "densenet of four layers": (lambda: torchvision.models.DenseNet(16, (1, 1, 1, 1), 32), 64),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, 64),
    "regnetx_002": (lambda: timm_model("regnetx_002"), 64),
}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "densenet of four layers"])
def test_surgery_equals_masking(name: str, rng: np.random.Generator) -> None:
    build, size = MODELS[name]
    torch.manual_seed(0)
    model = randomize_norms(build()).eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    coupling = find_coupling(model, x)
    keep = random_keep(coupling, rng)
    before = outputs_of(model, x)
    masked = masked_outputs(model, coupling, keep, x)
    small = remove_channels(model, coupling, keep)
    scale = float(masked.abs().max())
    assert scale > 0
    # float32 sums in another order, relative to the outputs' range
    assert float((masked - outputs_of(small, x)).abs().max()) <= 1e-4 * max(1.0, scale)
    assert not torch.equal(masked, before)
    torch.testing.assert_close(outputs_of(model, x), before)  # the masks left no trace
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["residual", "mobilenet_v2", "regnetx_002", "densenet of four layers"]
)
def test_resized_graph_is_the_exported_small_network(name: str, rng: np.random.Generator) -> None:
    build, size = MODELS[name]
    model = randomize_norms(build()).eval()
    x = torch.randn(1, 3, size, size)
    coupling = find_coupling(model, x)
    graph = DeployedGraph(export_onnx(model, x), coupling)
    keep = random_keep(coupling, rng)
    resized = onnx.load_from_string(graph.resized(kept_widths(coupling, keep)))
    exported = export_onnx(remove_channels(model, coupling, keep), x)
    assert conv_shapes(resized) == conv_shapes(exported)
    assert [n.op_type for n in resized.graph.node] == [n.op_type for n in exported.graph.node]


def test_optimizer_parameters_stay_the_models_own(
    residual: nn.Module, images: torch.Tensor
) -> None:
    """A user's optimizer exists before the masks do, and still trains what is left after them."""
    before = dict(residual.named_parameters())
    coupling = find_coupling(residual, images)
    masks = ChannelMasks(residual, coupling, images)
    live = set(map(id, residual.parameters()))
    assert live == set(map(id, before.values()))
    masks.remove()
    after = dict(residual.named_parameters())
    assert {n: id(p) for n, p in after.items()} == {n: id(p) for n, p in before.items()}


def test_excluded_layers_keep_their_channels(residual: nn.Module, images: torch.Tensor) -> None:
    coupling = find_coupling(residual, images, ["a1*"])
    frozen = {g.name: g.frozen for g in coupling.groups if g.frozen}
    assert frozen == {"a1": "excluded (a1)", "head": "network output"}


def test_a_residual_stream_is_one_group(residual: nn.Module, images: torch.Tensor) -> None:
    coupling = find_coupling(residual, images)
    stream = next(g for g in coupling.groups if g.name == "stem")
    assert stream.layers == ("stem", "a2", "dw")


def test_save_and_load(residual: nn.Module, images: torch.Tensor, tmp_path, rng) -> None:
    coupling = find_coupling(residual, images)
    keep = random_keep(coupling, rng)
    small = remove_channels(residual, coupling, keep)
    save_pruned(tmp_path, small, coupling, keep, images)
    again = load_pruned(Residual(), tmp_path)
    assert torch.equal(outputs_of(again, images), outputs_of(small, images))


def test_load_refuses_another_network(residual: nn.Module, images, tmp_path, rng) -> None:
    coupling = find_coupling(residual, images)
    keep = random_keep(coupling, rng)
    save_pruned(tmp_path, remove_channels(residual, coupling, keep), coupling, keep, images)
    with pytest.raises(RunFolderError, match="made from another network"):
        load_pruned(Residual(48), tmp_path)
    with pytest.raises(RunFolderError, match=r"widths\.json is missing"):
        load_pruned(Residual(), tmp_path / "nowhere")


def test_unsupported_layers_are_named(images: torch.Tensor) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.norm = nn.GroupNorm(4, 16)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.conv(x)))

    groups = find_coupling(Grouped(), images).groups
    assert groups[0].frozen == "norm (group-norm) computes over groups of them"
    with pytest.raises(UnsupportedModel, match=r"conv: norm \(group-norm\)"):
        take_inventory(Grouped(), images)
