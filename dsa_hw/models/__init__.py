"""Networks: the field's CIFAR networks, and names turned into models."""

from dsa_hw.models.cifar import CifarMobileNetV2, CifarResNet, CifarVGG16
from dsa_hw.models.registry import default_input_shape, resolve_model

__all__ = [
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarVGG16",
    "default_input_shape",
    "resolve_model",
]
