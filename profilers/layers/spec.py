"""What decides a layer's cost: the key of every measurement."""

from __future__ import annotations

import re
from dataclasses import dataclass

from profilers.errors import TableError
from profilers.layers.kinds.registry import LAYER_KINDS

FUSED_ACTIVATIONS = ("relu", "clip")
"""Activations that the runtimes fold into the layer before them, if its kind lets them."""

_TEXT = re.compile(
    r"(?P<op>[a-z][a-z0-9_]*) k(?P<kernel>\d+x\d+) s(?P<stride>\d+x\d+) "
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
        op: its kind's name in ``LAYER_KINDS``: ``conv``, or ``gemm`` (a fully connected layer;
            height and width are 1).
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
            TableError: the text is not of that form, or no layer kind has the layer's name.
        """
        match = _TEXT.fullmatch(text) if len(text) <= 400 else None
        if match is None:
            raise TableError(f"not a layer description: {text!r}")
        if match["op"] not in LAYER_KINDS:
            raise TableError(
                f"not a layer description: {text!r} (no layer kind is called {match['op']!r}; "
                f"known: {', '.join(LAYER_KINDS)}; register your own before you read a table)"
            )

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
        return LAYER_KINDS[self.op].family(self)

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
        return LAYER_KINDS[self.op].output_size(self)

    def weight_count(self, cin: int, cout: int) -> int:
        """Weights without the bias: ``kernel * cin * cout``, over the groups of a tied layer."""
        return self.kernel[0] * self.kernel[1] * (cin // self.group_count(cin)) * cout

    def flops(self, cin: int, cout: int) -> int:
        """Multiply-accumulates times two, for the whole batch."""
        return LAYER_KINDS[self.op].flops(self, cin, cout)

    def bytes_moved(self, cin: int, cout: int) -> int:
        """Bytes of input, output and weights at float32."""
        inputs = self.batch * cin * self.size[0] * self.size[1]
        outputs = self.batch * cout * self.output_size[0] * self.output_size[1]
        return 4 * (inputs + outputs + self.weight_count(cin, cout))
