"""A model's name turned into the model, and into the input it expects.

torchvision and timm are imported only when a name asks for them.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType

from torch import nn

from dsa_hw.errors import UserError
from dsa_hw.models import cifar
from dsa_hw.runs.factories import is_factory_name, load_factory

OWN_MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        factory.__name__: factory
        for factory in (
            cifar.cifar_resnet20,
            cifar.cifar_resnet32,
            cifar.cifar_resnet56,
            cifar.cifar_resnet110,
            cifar.cifar_resnet18,
            cifar.cifar_vgg16,
            cifar.cifar_mobilenetv2,
            cifar.glyphs_resnet,
            cifar.glyphs_resnet_flat,
            cifar.glyphs_resnet_wide,
            cifar.glyphs_resnet_stepped,
            cifar.glyphs_resnet8,
            cifar.glyphs_resnet10,
            cifar.glyphs_mobilenet,
            cifar.glyphs_mobilenet5,
        )
    }
)
_IMAGENET_CLASSES = 1000


def resolve_model(
    name: str, *, num_classes: int | None = None, pretrained: bool = False
) -> nn.Module:
    """The model that ``name`` stands for.

    Args:
        name: one of the project's networks (``cifar_resnet56``), a torchvision
            classification model (``resnet18``), ``timm:NAME``, or
            ``package.module:factory`` (given ``num_classes`` if it takes that).
        num_classes: outputs; None leaves the model's own number.
        pretrained: load the torchvision or timm weights, with a fresh head where
            ``num_classes`` is not the weights' own.

    Raises:
        UserError: no such model, a missing package, or weights that cannot be had.
    """
    if name.startswith("timm:"):
        return _timm_model(name.removeprefix("timm:"), num_classes, pretrained)
    if name in OWN_MODELS or is_factory_name(name):
        _refuse_pretrained(name, pretrained)
        factory = OWN_MODELS[name] if name in OWN_MODELS else load_factory(name)
        return _checked(name, _called(factory, num_classes))
    return _torchvision_model(name, num_classes, pretrained)


def default_input_shape(name: str) -> tuple[int, int, int]:
    """Channels, height and width that the model of that name is meant for.

    Raises:
        UserError: a ``timm:NAME`` that timm lacks, or timm is not installed.
    """
    if name.startswith("timm:"):
        return _timm_input_shape(name.removeprefix("timm:"))
    if name in OWN_MODELS:
        return (3, 24, 24) if name.startswith("glyphs_") else (3, 32, 32)
    return (3, 299, 299) if name == "inception_v3" else (3, 224, 224)


def _torchvision_model(name: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    models = _import_torchvision_models()
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown_model(name, [*OWN_MODELS, *known])
    # two networks have auxiliary classifiers; without them a network has one output
    has_auxiliary = name in ("googlenet", "inception_v3")
    if not pretrained:
        options = {"aux_logits": False, "init_weights": True} if has_auxiliary else {}
        classes = _IMAGENET_CLASSES if num_classes is None else num_classes
        return models.get_model(name, weights=None, num_classes=classes, **options)
    try:
        model = models.get_model(name, weights="DEFAULT")
    except (OSError, RuntimeError) as error:  # no connection, or a damaged download
        raise _no_weights(name, error) from error
    if name == "inception_v3":  # loads with its classifier; googlenet drops its own
        model.aux_logits, model.AuxLogits = False, None
    if num_classes is not None and num_classes != _IMAGENET_CLASSES:
        _replace_head(model, num_classes)
    return model


def _replace_head(model: nn.Module, num_classes: int) -> None:
    """Put a fresh layer of ``num_classes`` outputs where the last classifying layer was."""
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear) and module.out_features == _IMAGENET_CLASSES:
            fresh: nn.Module = nn.Linear(module.in_features, num_classes)
        elif isinstance(module, nn.Conv2d) and module.out_channels == _IMAGENET_CLASSES:
            fresh = nn.Conv2d(module.in_channels, num_classes, 1)  # SqueezeNet
        else:
            continue
        model.set_submodule(path, fresh)
        return
    raise UserError(
        f"{type(model).__name__} has no layer of {_IMAGENET_CLASSES} outputs to replace by one "
        f"of {num_classes}. Wrap it in a package.module:factory that sets its head."
    )


def _called(factory: Callable[..., object], num_classes: int | None) -> object:
    """A factory's model; one that takes no ``num_classes`` has its own number of outputs."""
    if num_classes is None:
        return factory()
    parameters = inspect.signature(factory).parameters.values()
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    return factory(num_classes=num_classes) if takes else factory()


def _timm_model(name: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    timm = _import_timm()
    _check_timm_name(timm, name)
    head = {} if num_classes is None else {"num_classes": num_classes}
    if not pretrained:
        return timm.create_model(name, pretrained=False, **head)
    try:
        return timm.create_model(name, pretrained=True, **head)
    except (OSError, RuntimeError) as error:  # no connection, no such weights
        raise _no_weights(f"timm:{name}", error) from error


def _timm_input_shape(name: str) -> tuple[int, int, int]:
    timm = _import_timm()
    _check_timm_name(timm, name)
    channels, height, width = timm.get_pretrained_cfg(name).input_size
    return channels, height, width


def _check_timm_name(timm: ModuleType, name: str) -> None:
    if not timm.is_model(name):
        raise _unknown_model(f"timm:{name}", [f"timm:{known}" for known in timm.list_models()])


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "timm: models need the timm package, which does not import here "
            f"({error}). Install it:  pip install timm"
        ) from error
    return timm


def _import_torchvision_models() -> ModuleType:
    try:
        from torchvision import models
    except ImportError as error:
        raise UserError(
            "torchvision's models need the torchvision package, which does not import here "
            f"({error}). Install it:  pip install torchvision"
        ) from error
    return models


def _checked(name: str, model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{name} returned a {type(model).__name__}; a model factory must return a "
            "torch.nn.Module"
        )
    return model


def _refuse_pretrained(name: str, pretrained: bool) -> None:
    if pretrained:
        raise UserError(
            f"there are no pretrained weights for {name}. Leave pretrained off, or name a "
            "package.module:factory that loads its own."
        )


def _no_weights(name: str, error: Exception) -> UserError:
    return UserError(
        f"cannot load the pretrained weights of {name}: {error}. "
        "Check the connection, or leave pretrained off."
    )


def _unknown_model(name: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"Close: {', '.join(close)}. " if close else ""
    return UserError(
        f"unknown model {name!r}. {hint}A model is one of {', '.join(OWN_MODELS)}, a "
        "torchvision classification model, timm:NAME, or package.module:factory."
    )
