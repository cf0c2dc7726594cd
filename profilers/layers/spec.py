"""What decides a layer's cost: the key of every measurement."""

from __future__ import annotations

import re
from dataclasses import dataclass

from profilers.errors import TableError

FUSED_ACTIVATIONS = ("relu", "clip")
"""Activations that the runtimes fold into the convolution before them."""

_TEXT = re.compile(
    r"(?P<op>conv|gemm) k(?P<kernel>\d+x\d+) s(?P<stride>\d+x\d+) "
    r"p(?P<pads>\d+\.\d+\.\d+\.\d+) d(?P<dilation>\d+x\d+) g(?P<groups>dense|depthwise|width\d+) "
    r"(?P<size>\d+x\d+) b(?P<batch>\d+) (?P<dtype>\w+)(?: \+(?P<tail>[\w+]+))?",
    re.ASCII,
)
_LARGEST = 2**31


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What decides one layer's cost on a fixed device and runtime, but for its channels.

    Names and weights are left out: equal specs share one measurement, across layers and models.

    Args:
        op: ``conv`` or ``gemm`` (a fully connected layer; height and width are 1).
        kernel, stride, dilation: (vertical, horizontal).
        pads: (top, left, bottom, right), as in ONNX.
        groups: ``dense``, ``depthwise``, or ``widthN``: a grouped convolution whose groups stay
            N channels wide, so that fewer channels mean fewer groups.
        size: input (height, width).
        batch: samples per run.
        dtype: ``fp32``, ``fp16`` or ``int8``.
        tail: what the runtime fuses behind it, in order: ``add`` (a residual), ``relu``, ``clip``.

    ``str(spec)`` is the form in the table files; ``LayerSpec.parse`` is its inverse.
    """

    op: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: str
    size: tuple[int, int]
    batch: int
    dtype: str = "fp32"
    tail: tuple[str, ...] = ()

    def __str__(self) -> str:
        pair = "{0[0]}x{0[1]}".format
        text = (
            f"{self.op} k{pair(self.kernel)} s{pair(self.stride)} p{'.'.join(map(str, self.pads))} "
            f"d{pair(self.dilation)} g{self.groups} {pair(self.size)} b{self.batch} {self.dtype}"
        )
        return text + (" +" + "+".join(self.tail) if self.tail else "")

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        """The spec that ``text`` is the ``str`` of.

        Raises:
            TableError: the text is not of that form.
        """
        match = _TEXT.fullmatch(text) if len(text) <= 400 else None
        if match is None:
            raise TableError(f"not a layer description: {text!r}")

        def pair(name: str) -> tuple[int, int]:
            first, second = match[name].split("x")
            return int(first), int(second)

        top, left, bottom, right = map(int, match["pads"].split("."))
        spec = cls(
            op=match["op"],
            kernel=pair("kernel"),
            stride=pair("stride"),
            pads=(top, left, bottom, right),
            dilation=pair("dilation"),
            groups=match["groups"],
            size=pair("size"),
            batch=int(match["batch"]),
            dtype=match["dtype"],
            tail=tuple(match["tail"].split("+")) if match["tail"] else (),
        )
        sizes = (*spec.kernel, *spec.stride, *spec.dilation, *spec.size, spec.batch)
        if str(spec) != text or not all(0 < n < _LARGEST for n in sizes) or spec.groups == "width0":
            raise TableError(f"not a layer description (a size that cannot be): {text!r}")
        return spec

    @property
    def kind(self) -> str:
        """The family that shares a calibration scale and an alignment step."""
        if self.op == "gemm":
            return "gemm"
        if self.groups == "depthwise":
            return "depthwise"
        if self.groups != "dense":
            return "grouped"
        return "pointwise" if self.kernel == (1, 1) else "conv"

    @property
    def tied(self) -> bool:
        """Whether input and output channels are one number (depthwise and grouped layers)."""
        return self.groups != "dense"

    @property
    def group_width(self) -> int:
        """Input channels that one output channel of a tied layer reads.

        Raises:
            ValueError: the layer is dense: every output channel reads all of the input.
        """
        if self.groups == "dense":
            raise ValueError(f"a dense layer has no groups of its own ({self})")
        return 1 if self.groups == "depthwise" else int(self.groups.removeprefix("width"))

    def group_count(self, cin: int) -> int:
        """Convolution groups at ``cin`` input channels."""
        if self.groups == "dense":
            return 1
        width = self.group_width
        if cin % width:
            raise ValueError(f"{cin} channels are not a whole number of groups of {width} ({self})")
        return cin // width

    @property
    def output_size(self) -> tuple[int, int]:
        """Output (height, width)."""
        top, left, bottom, right = self.pads

        def length(axis: int, pad: int) -> int:
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            return (self.size[axis] + pad - reach) // self.stride[axis] + 1

        return length(0, top + bottom), length(1, left + right)

    def flops(self, cin: int, cout: int) -> int:
        """Multiply-accumulates times two, for the whole batch."""
        height, width = self.output_size
        taps = self.kernel[0] * self.kernel[1] * cin // self.group_count(cin)
        return 2 * self.batch * height * width * cout * taps

    def bytes_moved(self, cin: int, cout: int) -> int:
        """Bytes of input, output and weights at float32."""
        taps = self.kernel[0] * self.kernel[1] * cin // self.group_count(cin)
        inputs = self.batch * cin * self.size[0] * self.size[1]
        outputs = self.batch * cout * self.output_size[0] * self.output_size[1]
        return 4 * (inputs + outputs + taps * cout)
