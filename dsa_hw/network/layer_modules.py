"""Which PyTorch modules are layers, and where they have their channels.

The layer kinds name the modules (``profilers.layers.kinds``), which the measuring package cannot
import. Batch-norms are cut with the layers, and are no layers: they are folded away.
"""

from __future__ import annotations

import functools

from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from dsa_hw.runs.factories import load_factory
from profilers.layers.kinds.kind import WeightAxes
from profilers.layers.kinds.registry import LAYER_KINDS

CHANNEL_ATTRIBUTES = {
    "out": ("out_channels", "out_features", "num_features"),
    "in": ("in_channels", "in_features"),
}
"""What modules call the number of their channels, by side."""


def layer_types() -> tuple[type[nn.Module], ...]:
    """Classes of the modules that have a row in the latency table."""
    return tuple(_module_class(name) for kind in LAYER_KINDS.values() for name in kind.modules)


def prunable_types() -> tuple[type[nn.Module], ...]:
    """Classes of the modules that channels can be taken out of."""
    return (*layer_types(), *norm_types())


def norm_types() -> tuple[type[nn.Module], ...]:
    """Classes of the norms whose channels go with those of the layers around them."""
    return (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def weight_axes(module: nn.Module) -> WeightAxes:
    """Where a layer's weight has its channels.

    Raises:
        TypeError: the module is no layer.
    """
    for kind in LAYER_KINDS.values():
        for name, axes in kind.modules.items():
            if isinstance(module, _module_class(name)):
                return axes
    raise TypeError(f"{type(module).__name__} is of no layer kind")


def channel_axis(module: nn.Module) -> int:
    """The axis of a layer's or norm's output that its channels are on."""
    return -1 if isinstance(module, nn.Linear) else 1


def group_count(module: nn.Module) -> int:
    """Groups of input channels, of which each output channel reads one; 1 where it reads all."""
    return getattr(module, "groups", 1) if isinstance(module, layer_types()) else 1


def channel_attribute(module: nn.Module, side: str) -> str | None:
    """Name of the attribute that holds a module's channels; None if it has none on that side.

    Args:
        side: ``"in"`` or ``"out"``.
    """
    return next((name for name in CHANNEL_ATTRIBUTES[side] if hasattr(module, name)), None)


@functools.cache
def _module_class(name: str) -> type[nn.Module]:
    found = load_factory(name)
    assert isinstance(found, type), name
    assert issubclass(found, nn.Module), name
    return found
