"""Names of the form ``package.module:factory``, turned into the callable they name."""

import importlib
from collections.abc import Callable

from dsa_hw.errors import UserError


def is_factory_name(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:factory``."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and _is_dotted(module)


def load_factory(name: str) -> Callable[..., object]:
    """The callable that ``package.module:factory`` names.

    Raises:
        UserError: the module does not import, or holds no such callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"cannot import {module_name!r}, the module of {name!r}: {error}. "
            "Install it, or put its folder on PYTHONPATH."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        found = "nothing of that name" if factory is None else f"a {type(factory).__name__}"
        raise UserError(
            f"{name!r} is not a factory: {module_name} holds {found} at {attribute!r}. "
            "Name a function or class as package.module:factory."
        )
    return factory


def _is_dotted(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))
