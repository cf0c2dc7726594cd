"""Convolutions of one and two dimensions: dense, grouped and depthwise."""

from __future__ import annotations

from dataclasses import replace

from profilers.layers.kinds.kind import Attributes, LayerKind, LayerNode, LayerShapes, WeightAxes
from profilers.layers.spec import LayerSpec

AXES = WeightAxes(out=0, into=1)
CANONICAL = {
    "conv": LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 28x28 b1 fp32 +relu"),
    "pointwise": LayerSpec.parse("conv k1x1 s1x1 p0.0.0.0 d1x1 gdense 56x56 b1 fp32 +relu"),
    "depthwise": LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdepthwise 112x112 b1 fp32 +relu"),
}


class Convolution(LayerKind):
    """ONNX's ``Conv`` on (N, C, H, W), and on (N, C, L), which is timed as one row of an image."""

    def read(self, node: LayerNode) -> tuple[LayerSpec, int, int]:
        if len(node.input_shape) == 3:
            node = _as_row(node)
        if len(node.input_shape) != 4:
            raise ValueError("only convolutions of one and two dimensions are supported")
        batch, _, height, width = node.input_shape
        outs, per_group, *kernel = node.weight_shape
        groups = node.attributes.get("group", 1)
        ins = per_group * groups
        spec = LayerSpec(
            op=self.name,
            kernel=(kernel[0], kernel[1]),
            stride=tuple(node.attributes.get("strides", (1, 1))),
            pads=tuple(node.attributes.get("pads", (0, 0, 0, 0))),
            dilation=tuple(node.attributes.get("dilations", (1, 1))),
            groups=_group_form(groups, ins, outs),
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
            "group": spec.group_count(cin),
        }

    def shapes(self, spec: LayerSpec, cin: int, cout: int) -> LayerShapes:
        return LayerShapes(
            input=(spec.batch, cin, *spec.size),
            output=(spec.batch, cout, *self.output_size(spec)),
            weight=(cout, cin // spec.group_count(cin), *spec.kernel),
        )

    def output_size(self, spec: LayerSpec) -> tuple[int, int]:
        top, left, bottom, right = spec.pads

        def length(axis: int, pad: int) -> int:
            reach = spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
            return (spec.size[axis] + pad - reach) // spec.stride[axis] + 1

        return length(0, top + bottom), length(1, left + right)

    def flops(self, spec: LayerSpec, cin: int, cout: int) -> int:
        """Every output pixel takes each weight once."""
        height, width = self.output_size(spec)
        return 2 * spec.batch * height * width * spec.weight_count(cin, cout)

    def family(self, spec: LayerSpec) -> str:
        """``conv``, ``pointwise``, ``grouped`` or ``depthwise``."""
        if spec.groups == "depthwise":
            return "depthwise"
        if spec.groups != "dense":
            return "grouped"
        return "pointwise" if spec.kernel == (1, 1) else "conv"

    def canonical(self, spec: LayerSpec) -> LayerSpec:
        """Grouped convolutions keep their groups' own width."""
        family = self.family(spec)
        if family == "grouped":
            return replace(CANONICAL["conv"], groups=spec.groups)
        return CANONICAL[family]


CONV = Convolution(
    name="conv",
    operator="Conv",
    modules={"torch.nn:Conv2d": AXES, "torch.nn:Conv1d": AXES},
    fuses_activation=True,
    swept_cin=64,
)


def _as_row(node: LayerNode) -> LayerNode:
    """A convolution of one dimension as one of two, on images of one row."""
    attributes = dict(node.attributes)
    for name, along in (("strides", 1), ("dilations", 1)):
        if name in attributes:
            attributes[name] = (along, *attributes[name])
    if "pads" in attributes:
        before, after = attributes["pads"]
        attributes["pads"] = (0, before, 0, after)
    batch, channels, length = node.input_shape
    outs, ins, size = node.weight_shape
    return LayerNode(attributes, (batch, channels, 1, length), (outs, ins, 1, size))


def _group_form(groups: int, ins: int, outs: int) -> str:
    if groups == 1:
        return "dense"
    if groups == ins == outs:
        return "depthwise"
    if ins == outs:
        return f"width{ins // groups}"
    raise ValueError(
        f"a grouped convolution from {ins} to {outs} channels in {groups} groups is not supported"
    )
