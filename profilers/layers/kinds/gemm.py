"""Fully connected layers on (N, C)."""

from __future__ import annotations

from profilers.layers.kinds.kind import Attributes, LayerKind, LayerNode, LayerShapes, WeightAxes
from profilers.layers.spec import LayerSpec

CANONICAL = LayerSpec.parse("gemm k1x1 s1x1 p0.0.0.0 d1x1 gdense 1x1 b1 fp32")


class Gemm(LayerKind):
    """ONNX's ``Gemm`` with a weight: a 1x1 convolution of one pixel, as a spec has it."""

    def read(self, node: LayerNode) -> tuple[LayerSpec, int, int]:
        axes = self.weight_axes(node.attributes)
        spec = LayerSpec(
            op=self.name,
            kernel=(1, 1),
            stride=(1, 1),
            pads=(0, 0, 0, 0),
            dilation=(1, 1),
            groups="dense",
            size=(1, 1),
            batch=node.input_shape[0],
        )
        return spec, node.weight_shape[axes.into], node.weight_shape[axes.out]

    def weight_axes(self, attributes: Attributes) -> WeightAxes:
        transposed = bool(attributes.get("transB", 0))
        return WeightAxes(out=0, into=1) if transposed else WeightAxes(out=1, into=0)

    def attributes(self, spec: LayerSpec, cin: int) -> Attributes:
        return {"transB": 1}

    def shapes(self, spec: LayerSpec, cin: int, cout: int) -> LayerShapes:
        return LayerShapes((spec.batch, cin), (spec.batch, cout), (cout, cin))

    def output_size(self, spec: LayerSpec) -> tuple[int, int]:
        return 1, 1

    def flops(self, spec: LayerSpec, cin: int, cout: int) -> int:
        """Every sample takes each weight once."""
        return 2 * spec.batch * cin * cout

    def family(self, spec: LayerSpec) -> str:
        """All are alike."""
        return self.name

    def canonical(self, spec: LayerSpec) -> LayerSpec:
        return CANONICAL


GEMM = Gemm(
    name="gemm",
    operator="Gemm",
    modules={"torch.nn:Linear": WeightAxes(out=0, into=1)},
    fuses_activation=False,
    swept_cin=4096,
)
