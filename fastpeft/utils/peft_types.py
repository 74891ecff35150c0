"""The names of methods and tasks, and the table of the methods that this library builds.

A method is its config class, its tuner class and the prefix of its parameter names. The methods of this library are
listed as dotted paths and imported when first asked for; others join with `register_peft_method`.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any


class PeftType(str, enum.Enum):  # noqa: UP042 (a StrEnum would print differently)
    """Every method that an adapter_config.json of PEFT 0.21 can name, built here or not."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, enum.Enum):  # noqa: UP042
    """What the base model is for; it decides which PeftModel class wraps it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class UnsupportedMethodError(NotImplementedError, KeyError):
    """A PEFT type that this library does not build. A KeyError too, because reference PEFT's tables raise that."""

    __str__ = Exception.__str__  # KeyError's would print the repr of the message


class MethodTable(MutableMapping[PeftType, Any]):
    """PEFT type to class. A value may be "module:name" until it is read; a missing type gets an error that explains."""

    def __init__(self, entries: dict[PeftType, Any]) -> None:
        self._entries = entries

    def __getitem__(self, peft_type: PeftType | str) -> Any:
        key = _as_peft_type(peft_type)
        if key not in self._entries:
            raise UnsupportedMethodError(
                f"PEFT type {key.value} is not supported yet: this release builds "
                f"{', '.join(sorted(self._entries))}. Load the adapter with reference PEFT, or add the method with "
                "fastpeft.utils.peft_types.register_peft_method"
            )
        if isinstance(self._entries[key], str):
            module, _, name = self._entries[key].partition(":")
            self._entries[key] = getattr(importlib.import_module(module), name)
        return self._entries[key]

    def __setitem__(self, peft_type: PeftType | str, value: Any) -> None:
        self._entries[_as_peft_type(peft_type)] = value

    def __delitem__(self, peft_type: PeftType | str) -> None:
        del self._entries[_as_peft_type(peft_type)]

    def __contains__(self, peft_type: object) -> bool:
        return peft_type in self._entries  # without importing anything

    def __iter__(self) -> Iterator[PeftType]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _as_peft_type(name: PeftType | str) -> PeftType:
    try:
        return PeftType(name)
    except ValueError:
        raise UnsupportedMethodError(
            f"unknown PEFT type {name!r}: expected one of {', '.join(PeftType.__members__)}. If a newer PEFT wrote the "
            "adapter, upgrade fastpeft"
        ) from None


PEFT_TYPE_TO_CONFIG_MAPPING = MethodTable(
    {
        PeftType.IA3: "fastpeft.tuners.ia3.config:IA3Config",
        PeftType.LORA: "fastpeft.tuners.lora.config:LoraConfig",
    }
)
_TUNERS: dict[PeftType, Any] = {
    PeftType.IA3: "fastpeft.tuners.ia3.model:IA3Model",
    PeftType.LORA: "fastpeft.tuners.lora.model:LoraModel",
}
PEFT_TYPE_TO_TUNER_MAPPING = MethodTable(dict(_TUNERS))
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = MethodTable(dict(_TUNERS))
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.IA3: "ia3_", PeftType.LORA: "lora_"}


def register_peft_method(
    *,
    name: str,
    config_cls: type | str,
    model_cls: type | str | None,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Make a method known to configs, tuners and files.

    Args:
        name: the PEFT type in lower case, for example "ia3".
        config_cls: config class, or "module:class" to import it when first needed.
        model_cls: tuner class, likewise; None for a method that injects no layers.
        prefix: what the method's parameter names start with; `name` and an underscore unless given.
        is_mixed_compatible: whether its layers may stand beside those of other methods in one model.

    Raises:
        ValueError: `name` is no lower-case PEFT type, or `prefix` is not the tuner class's own.
        KeyError: the method or the prefix is taken.
    """
    if name != name.lower() or name.upper() not in PeftType.__members__:
        raise ValueError(f"name must be one of the PEFT types in lower case, such as 'lora'; got {name!r}")
    peft_type = PeftType(name.upper())
    prefix = prefix or f"{name}_"
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise KeyError(f"method {name!r} is already registered; a PEFT type belongs to one method")
    if prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise KeyError(f"prefix {prefix!r} already belongs to another method; pass another one")
    own_prefix = getattr(model_cls, "prefix", prefix)
    if own_prefix != prefix:
        raise ValueError(f"prefix is {prefix!r} but {model_cls}.prefix is {own_prefix!r}: they must be equal")

    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
    if is_mixed_compatible:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = model_cls
