"""Layer kinds: what each says of its layers fits together, and one from outside goes all the way.

The toy kind is a transposed convolution, whose weight has its channels the other way round and
whose output is larger than its input: what holds for convolutions alone shows.
"""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import randomize_norms
from fake_device import STEP, FakeDevice, network_ms
from onnx import helper, numpy_helper, shape_inference
from torch import Tensor, nn

from dsa_hw.cost.counted import count, flops_budget, params_budget
from dsa_hw.cost.latency.profiling import profile_network
from dsa_hw.network.inventory import take_inventory
from dsa_hw.network.removal import remove_channels
from dsa_hw.worth.importance import filter_l1
from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.collect import nominal_reference_ms
from profilers.errors import TableError
from profilers.layers.kinds.conv import CONV
from profilers.layers.kinds.kind import Attributes, LayerKind, LayerNode, LayerShapes, WeightAxes
from profilers.layers.kinds.registry import LAYER_KINDS
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.precision import at_precision
from profilers.table import LatencyTable, LayerKey
from profilers.timing import Round, SamplePlan

# -- the toy ---------------------------------------------------------------------------------

AXES = WeightAxes(out=1, into=0)


class Transposed(LayerKind):
    """ONNX's ``ConvTranspose`` on (N, C, H, W), dense and without padding of its output."""

    def read(self, node: LayerNode) -> tuple[LayerSpec, int, int]:
        if node.attributes.get("group", 1) != 1:
            raise ValueError("grouped transposed convolutions are not supported")
        if any(node.attributes.get("output_padding", ())):
            raise ValueError("transposed convolutions with output padding are not supported")
        batch, _, height, width = node.input_shape
        ins, outs, *kernel = node.weight_shape
        spec = LayerSpec(
            op=self.name,
            kernel=(kernel[0], kernel[1]),
            stride=tuple(node.attributes.get("strides", (1, 1))),
            pads=tuple(node.attributes.get("pads", (0, 0, 0, 0))),
            dilation=tuple(node.attributes.get("dilations", (1, 1))),
            groups="dense",
            size=(height, width),
            batch=batch,
        )
        return spec, ins, outs

    def weight_axes(self, attributes: Attributes) -> WeightAxes:
        return AXES

    def attributes(self, spec: LayerSpec, cin: int) -> Attributes:
        return {
            "kernel_shape": spec.kernel,
            "strides": spec.stride,
            "pads": spec.pads,
            "dilations": spec.dilation,
        }

    def shapes(self, spec: LayerSpec, cin: int, cout: int) -> LayerShapes:
        return LayerShapes(
            input=(spec.batch, cin, *spec.size),
            output=(spec.batch, cout, *self.output_size(spec)),
            weight=(cin, cout, *spec.kernel),
        )

    def output_size(self, spec: LayerSpec) -> tuple[int, int]:
        def length(axis: int) -> int:
            reach = spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
            pads = spec.pads[axis] + spec.pads[axis + 2]
            return spec.stride[axis] * (spec.size[axis] - 1) + reach - pads

        return length(0), length(1)

    def flops(self, spec: LayerSpec, cin: int, cout: int) -> int:
        return 2 * spec.batch * math.prod(spec.size) * spec.weight_count(cin, cout)

    def family(self, spec: LayerSpec) -> str:
        return self.name

    def canonical(self, spec: LayerSpec) -> LayerSpec:
        return LayerSpec(
            self.name, (2, 2), (2, 2), (0, 0, 0, 0), (1, 1), "dense", (28, 28), 1, tail=("relu",)
        )


TRANSPOSED = Transposed(
    name="conv_transpose",
    operator="ConvTranspose",
    modules={"torch.nn:ConvTranspose2d": AXES},
    fuses_activation=True,
    swept_cin=64,
)


@pytest.fixture
def toy() -> Iterator[LayerKind]:
    LAYER_KINDS.register(TRANSPOSED)
    yield TRANSPOSED
    LAYER_KINDS.remove(TRANSPOSED.name)


class Upscaled(nn.Module):
    """A stem, two transposed convolutions (one with a batch-norm), and a head."""

    def __init__(self, groups: int = 1, output_padding: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 48, 2, stride=2, groups=groups)
        self.bn = nn.BatchNorm2d(48)
        self.wide = nn.ConvTranspose2d(
            48, 40, 3, stride=2, padding=1, output_padding=output_padding
        )
        self.head = nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.up(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))


def built(**options: int) -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(Upscaled(**options)).eval()


IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))

# -- what every kind has to hold ---------------------------------------------------------------

LAYERS = [
    ("conv k3x3 s2x1 p1.0.1.2 d1x2 gdense 9x12 b2 fp32 +relu", 8, 16),
    ("conv k1x1 s1x1 p0.0.0.0 d1x1 gdense 6x6 b1 fp32", 8, 16),
    ("conv k3x3 s1x1 p1.1.1.1 d1x1 gdepthwise 8x8 b1 fp32", 16, 16),
    ("conv k3x3 s1x1 p1.1.1.1 d1x1 gwidth4 8x8 b1 fp32", 16, 16),
    ("gemm k1x1 s1x1 p0.0.0.0 d1x1 gdense 1x1 b3 fp32", 32, 8),
    ("conv_transpose k3x2 s2x1 p1.0.1.0 d1x2 gdense 5x7 b2 fp32", 8, 16),
]
each_layer = pytest.mark.parametrize(
    ("text", "cin", "cout"), LAYERS, ids=[" ".join(t.split()[::5]) for t, _, _ in LAYERS]
)


def layer_node(model: bytes) -> tuple[onnx.NodeProto, LayerNode, tuple[int, ...]]:
    """The layer of a one-layer model, what its kind reads, and its output's inferred shape."""
    graph = onnx.load_from_string(model).graph
    node = graph.node[0]
    graph.output[0].type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(helper.make_model(graph), strict_mode=True).graph
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    weight = next(i for i in graph.initializer if i.name == node.input[1])
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    read = LayerNode(attributes, shapes[node.input[0]], tuple(weight.dims))
    return node, read, shapes[node.output[0]]


@pytest.mark.usefixtures("toy")
@each_layer
def test_a_layer_is_read_from_its_own_model(text: str, cin: int, cout: int) -> None:
    spec = LayerSpec.parse(text)
    assert str(spec) == text
    kind = LAYER_KINDS[spec.op]
    node, read, output_shape = layer_node(layer_model(spec, cin, cout))
    assert node.op_type == kind.operator
    assert kind.read(read) == (dataclasses.replace(spec, tail=()), cin, cout)
    axes = kind.weight_axes(read.attributes)
    assert read.weight_shape[axes.out] == cout
    assert read.weight_shape[axes.into] == cin // spec.group_count(cin)
    assert math.prod(read.weight_shape) == spec.weight_count(cin, cout)
    assert output_shape == kind.shapes(spec, cin, cout).output


@pytest.mark.usefixtures("toy")
@each_layer
def test_flops_are_in_proportion_to_the_weights(text: str, cin: int, cout: int) -> None:
    spec = LayerSpec.parse(text)
    ratios = {
        spec.flops(n * cin, n * cout) / spec.weight_count(n * cin, n * cout) for n in (1, 2, 5)
    }
    assert len(ratios) == 1


@pytest.mark.usefixtures("toy")
@each_layer
def test_the_canonical_layer_is_of_the_same_family(text: str, cin: int, cout: int) -> None:
    spec = LayerSpec.parse(text)
    canonical = LAYER_KINDS[spec.op].canonical(spec)
    assert canonical.kind == spec.kind
    assert LayerSpec.parse(str(canonical)) == canonical


@pytest.mark.usefixtures("toy")
def test_no_two_kinds_share_a_name_an_operator_or_a_family() -> None:
    assert {name: kind.name for name, kind in LAYER_KINDS.items()} == {n: n for n in LAYER_KINDS}
    operators = [kind.operator for kind in LAYER_KINDS.values()]
    assert len(set(operators)) == len(operators)
    owners: dict[str, set[str]] = {}
    for spec in (LayerSpec.parse(text) for text, _, _ in LAYERS):
        owners.setdefault(spec.kind, set()).add(spec.op)
    assert all(len(kinds) == 1 for kinds in owners.values())


def test_the_registry_imports_no_framework() -> None:
    code = (
        "import sys; from profilers.layers.kinds.registry import LAYER_KINDS; "
        "list(LAYER_KINDS.values()); sys.exit(bool({'torch', 'onnx', 'dsa_hw'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- registration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "conv"}, "is called 'conv' already"),
        ({"name": "Transposed conv"}, "cannot be called 'Transposed conv'"),
        ({"operator": "Conv"}, "the operator Conv is the layer kind 'conv'"),
    ],
)
def test_what_would_confuse_two_kinds_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYER_KINDS.register(dataclasses.replace(TRANSPOSED, **changed))
    assert list(LAYER_KINDS) == ["conv", "gemm"]


def test_a_table_with_a_kind_that_nobody_registered_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    key = LayerKey(TRANSPOSED.canonical(LayerSpec.parse(LAYERS[0][0])), 16, 32)
    LAYER_KINDS.register(TRANSPOSED)
    table = LatencyTable.open(path, dict(FakeDevice().provenance()) | {"reference_ms": 1.0})
    table.append(key, Round(1.0, 0.9, 1.2, 5, 3), 1.0)
    assert key in LatencyTable.load(path)
    LAYER_KINDS.remove(TRANSPOSED.name)
    with pytest.raises(TableError, match=r"no layer kind is called 'conv_transpose'; known: conv"):
        LatencyTable.load(path)


# -- all the way -------------------------------------------------------------------------------


def test_without_its_kind_a_layer_keeps_its_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 2), nn.ReLU(), nn.Conv2d(16, 4, 3),
    )  # fmt: skip
    graph = take_inventory(model, IMAGE)
    reasons = {g.name: g.frozen for g in graph.coupling.groups}
    assert reasons["0"] is None
    assert "a ConvTranspose2d cannot be made smaller yet" in str(reasons["2"])
    assert graph.unknown_operations == ("ConvTranspose",)


@pytest.mark.usefixtures("toy")
def test_it_is_cut_as_its_kind_says() -> None:
    """The inventory compares the masked, the cut and the deployed network."""
    model = built()
    graph = take_inventory(model, IMAGE)
    assert {g.name for g in graph.coupling.groups if g.frozen is None} == {"stem", "up", "wide"}
    assert [str(layer.spec) for layer in graph.layers][1:3] == [
        "conv_transpose k2x2 s2x2 p0.0.0.0 d1x1 gdense 8x8 b1 fp32 +relu",
        "conv_transpose k3x3 s2x2 p1.1.1.1 d1x1 gdense 16x16 b1 fp32 +relu",
    ]
    keep = [np.arange(g.atoms) % (1 if g.frozen else 2) == 0 for g in graph.coupling.groups]
    small = remove_channels(model, graph.coupling, keep)
    up, wide = small.get_submodule("up"), small.get_submodule("wide")
    assert (up.in_channels, up.out_channels) == (16, 24)
    assert (wide.in_channels, wide.out_channels) == (24, 20)
    widths = [16, 24, 20, 7]
    pixels = {"stem": 64, "up": 64, "wide": 256, "head": 1}
    sizes = {name: p.numel() for name, p in small.named_parameters()}
    assert count(params_budget(graph, 0.0), widths) == sum(sizes[f"{n}.weight"] for n in pixels)
    flops = sum(2 * n * sizes[f"{name}.weight"] for name, n in pixels.items())
    assert count(flops_budget(graph, 0.0), widths) == flops


@pytest.mark.usefixtures("toy")
def test_its_filters_are_scored_along_the_right_axis() -> None:
    model = built()
    graph = take_inventory(model, IMAGE)
    wide = [g.name for g in graph.coupling.groups].index("wide")
    weight = model.get_submodule("wide").weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight[:, 5] *= 100.0
    scores = filter_l1(model, graph.coupling, IMAGE.device)()[wide]
    assert int(scores[:40].argmax()) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "up makes or takes them: grouped"),
        ({"output_padding": 1}, "wide makes or takes them: transposed.*output padding"),
    ],
)
@pytest.mark.usefixtures("toy")
def test_what_a_kind_cannot_read_keeps_its_channels(options: dict[str, int], message: str) -> None:
    graph = take_inventory(built(**options), IMAGE)
    frozen = [g.frozen for g in graph.coupling.groups if g.frozen]
    assert any(re.search(message, why) for why in frozen)
    assert len(frozen) < len(graph.coupling.groups)
    assert set(graph.unread) & {"up", "wide"}
    with torch.no_grad():
        weights = sum(p.numel() for n, p in built(**options).named_parameters() if "weight" in n)
    assert count(params_budget(graph, 0.0), graph.dense_widths) <= weights


@pytest.mark.usefixtures("toy")
def test_it_is_swept_and_priced() -> None:
    graph = take_inventory(built(), IMAGE)
    reference_ms = nominal_reference_ms(FakeDevice())  # so that its speed is exactly 1
    table = LatencyTable(dict(FakeDevice().provenance()) | {"reference_ms": reference_ms})
    latency = profile_network(graph, FakeDevice(), table, networks=12, rounds=2).latency
    assert latency.steps["conv_transpose"] == STEP
    for seed in range(10):
        widths = latency.choices.random(np.random.default_rng(1000 + seed))
        truth = 0.01 + network_ms(graph.resized(widths))
        predicted = float(latency.model.staircase_ms(torch.tensor(widths).float()))
        # the fake device's layers are bilinear in the widths; only the calibration's ridge is off
        assert predicted == pytest.approx(truth, rel=0.01)


@pytest.mark.usefixtures("toy")
def test_a_runtime_measures_it() -> None:
    spec = LayerSpec.parse(LAYERS[-1][0])
    with OnnxRuntimeCpu(threads=1).open_layer(layer_model(spec, 8, 16)) as runner:
        taken = runner.take_round(SamplePlan(sample_ms=0.1, samples=1, warmup_ms=0.1))
    assert taken.median_ms > 0


@pytest.mark.usefixtures("toy")
@each_layer
def test_int8_scales_lie_along_the_output_channels(text: str, cin: int, cout: int) -> None:
    graph = onnx.load_from_string(
        at_precision(layer_model(LayerSpec.parse(text), cin, cout), "int8")
    )
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    makers = {name: node for node in graph.graph.node for name in node.output}
    layer = next(n for n in graph.graph.node if LAYER_KINDS.of_operator(n.op_type) is not None)
    dequantized = makers[layer.input[1]]
    assert tensors[dequantized.input[1]].shape == (cout,)


def test_a_kind_of_the_package_is_the_same_object_each_time() -> None:
    assert LAYER_KINDS["conv"] is CONV
    assert LAYER_KINDS.of_operator("Conv") is CONV
    assert LAYER_KINDS.of_operator("Softmax") is None
