"""Packages whose names are imported when first asked for (PEP 562), so that importing the package stays cheap."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, modules: dict[str, list[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """The `__getattr__` and `__all__` of a package that imports its names lazily.

    Args:
        package: the package's `__name__`.
        modules: absolute module name -> the names that come from it.

    Returns:
        `(__getattr__, __all__)`. A name that was asked for once is stored in the package and costs nothing after that.
        Modules inside the package are found too, as if the package had imported them.
    """
    origin = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in origin:
            if importlib.util.find_spec(f"{package}.{name}"):
                return importlib.import_module(f"{package}.{name}")
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(origin[name]), name)
        setattr(importlib.import_module(package), name, value)
        return value

    return __getattr__, sorted(origin)
