"""The adapter methods, one package each; imported when first asked for."""

from fastpeft.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fastpeft.tuners.ia3": ["IA3Config", "IA3Model"],
        "fastpeft.tuners.lora": ["LoraConfig", "LoraModel"],
    },
)
