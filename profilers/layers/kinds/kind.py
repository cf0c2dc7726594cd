"""What a kind of layer says of its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profilers.layers.spec import LayerSpec

Shape = tuple[int, ...]
Attributes = Mapping[str, Any]
"""Of an ONNX node, by name; those that have their default may be missing."""


@dataclass(frozen=True, slots=True)
class WeightAxes:
    """Where a weight has its layer's channels.

    Of a tied layer, ``out`` is the axis that shrinks, and ``into`` stays as it is.
    """

    out: int
    into: int


@dataclass(frozen=True, slots=True)
class LayerNode:
    """A layer as it stands in an ONNX graph."""

    attributes: Attributes
    input_shape: Shape
    weight_shape: Shape


@dataclass(frozen=True, slots=True)
class LayerShapes:
    """Shapes of a layer's tensors."""

    input: Shape
    output: Shape
    weight: Shape


@dataclass(frozen=True)
class LayerKind(ABC):
    """One kind of layer: how it is read from a graph, built alone, counted and swept for steps.

    It is plain Python: what it says of PyTorch it says by name.

    Args:
        name: the ``op`` of its specs, which the table files have.
        operator: ONNX's name. Its inputs are the data, the weight and, if it has one, the bias.
        modules: PyTorch's classes, as ``package.module:Class``, with the axes of their weights.
        fuses_activation: whether runtimes fold an activation behind such a layer into it.
        swept_cin: input channels of the layer whose output channels are swept for steps.
    """

    name: str
    operator: str
    modules: Mapping[str, WeightAxes]
    fuses_activation: bool
    swept_cin: int

    @abstractmethod
    def read(self, node: LayerNode) -> tuple[LayerSpec, int, int]:
        """The layer that a node is, at fp32 and without a tail, and its input and output channels.

        Raises:
            ValueError: such a layer is not supported; says what of it is not.
        """

    @abstractmethod
    def weight_axes(self, attributes: Attributes) -> WeightAxes:
        """Where the weight of a node with these attributes has its channels."""

    @abstractmethod
    def attributes(self, spec: LayerSpec, cin: int) -> Attributes:
        """Those of the node that is this layer at ``cin`` input channels."""

    @abstractmethod
    def shapes(self, spec: LayerSpec, cin: int, cout: int) -> LayerShapes:
        """Those of the node with these ``attributes``."""

    @abstractmethod
    def output_size(self, spec: LayerSpec) -> tuple[int, int]:
        """Output (height, width)."""

    @abstractmethod
    def flops(self, spec: LayerSpec, cin: int, cout: int) -> int:
        """Multiply-accumulates times two, for the whole batch; in proportion to the weights."""

    @abstractmethod
    def family(self, spec: LayerSpec) -> str:
        """The part of the kind that shares a calibration scale and an alignment step.

        No other kind may have a family of the same name.
        """

    @abstractmethod
    def canonical(self, spec: LayerSpec) -> LayerSpec:
        """The layer, the same for every network, that shows the steps of the spec's family well.

        Batch and precision do not matter: it is swept at those of ``spec``.
        """
