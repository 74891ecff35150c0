"""Why Trainer, accelerate and TRL take our models for adapter models.

They ask `isinstance(model, peft.PeftModel)`, and nothing can be registered there. So where reference PEFT is installed,
an instance of ours gets a class made at run time: our class first, its namesake in reference PEFT second. All that our
class has comes first in the method order; what only theirs has is hidden, so that a model behaves the same with and
without reference PEFT installed. Their functions that go through a model (get_peft_model_state_dict, which accelerate
calls for FSDP) ask the same of wrapped modules, and of tuners and their layers, whose classes do let us register.

All this happens with the first model, not at import: `import fastpeft` does not import peft.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T")
_joined: dict[tuple[type, type], type] = {}

# Where reference PEFT keeps what we keep elsewhere; what is not listed is at its top level.
_THEIR_MODULE = {"fastpeft.utils.auxiliary": "peft.utils.other"}

# Their abstract classes and, under the same path, ours.
_ABSTRACT = {
    "tuners.tuners_utils": ("BaseTuner", "BaseTunerLayer"),
    "tuners.ia3": ("IA3Model",),
    "tuners.ia3.layer": ("IA3Layer", "Linear"),
    "tuners.lora": ("LoraModel",),
    "tuners.lora.layer": ("LoraLayer", "Linear", "Embedding"),
}


def recognised_class(cls: type[_T]) -> type[_T]:
    """`cls` joined with its namesake in reference PEFT; `cls` itself where that library is not installed."""
    reference = _reference_peft()
    namesake = None if reference is None else _namesake(cls)
    if namesake is None or issubclass(cls, namesake):
        return cls
    if (cls, namesake) not in _joined:
        _joined[cls, namesake] = _join(cls, namesake)
    return _joined[cls, namesake]


def recognise_parts(model: nn.Module) -> None:
    """Let reference PEFT's functions find the adapters inside a model: its tuner, its layers, its wrapped modules."""
    from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper

    if _reference_peft() is None:
        return
    _register_tuners()
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.__class__ = recognised_class(type(module))


def _reference_peft() -> ModuleType | None:
    """Reference PEFT, imported; None where it is absent, broken, or where `peft` is an alias of this library."""
    try:
        if importlib.util.find_spec("peft") is None:
            return None
        module = importlib.import_module("peft")
    except ValueError:  # an alias in sys.modules without a spec of its own
        return None
    except ModuleNotFoundError as error:
        if error.name != "peft":
            _warn_broken(error)
        return None
    except ImportError as error:
        _warn_broken(error)
        return None
    return None if module.__name__ == __package__ else module


def _warn_broken(error: ImportError) -> None:
    warnings.warn(
        f"the installed peft fails to import ({error}), so Trainer, accelerate and TRL cannot see that this model has "
        "adapters. Repair peft, or uninstall it and use fastpeft.integrations.transformers.AdapterTrainerMixin",
        stacklevel=2,
    )


def _namesake(cls: type) -> type | None:
    """Reference PEFT's class with the name of the nearest of our classes that `cls` is or derives from."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == __package__:
            theirs = importlib.import_module(_THEIR_MODULE.get(base.__module__, "peft"))
            namesake = getattr(theirs, base.__name__, None)
            if isinstance(namesake, type):
                return namesake
    return None


def _join(cls: type, namesake: type) -> type:
    theirs = {
        name
        for base in namesake.__mro__
        if base.__module__.partition(".")[0] == "peft"
        for name in vars(base)
        if not (name.startswith("__") and name.endswith("__"))
    }
    body: dict[str, Any] = {name: _Hidden(name) for name in sorted(theirs) if not hasattr(cls, name)}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # The joined class has no name to import it by: pickles and copies name ours, and join again on arrival.
    body["__reduce_ex__"] = lambda self, protocol: (_new_instance, (cls,), self.__getstate__())
    return type(cls)(cls.__name__, (cls, namesake), body)


def _new_instance(cls: type[_T]) -> _T:
    """An empty instance for unpickling and copying to fill."""
    instance = cls.__new__(cls)
    instance.__class__ = recognised_class(cls)
    return instance


class _Hidden:
    """An attribute that only reference PEFT's class has: reading it fails as for any missing name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError(f"{(owner or type(instance)).__name__!r} object has no attribute {self.name!r}")


@functools.cache
def _register_tuners() -> None:
    for path, names in _ABSTRACT.items():
        theirs, ours = (importlib.import_module(f"{library}.{path}") for library in ("peft", __package__))
        for name in names:
            getattr(theirs, name).register(getattr(ours, name))
