"""LoRA: a low-rank change of frozen layers. arXiv:2106.09685."""

from fastpeft.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fastpeft.tuners.lora.config": ["LoraConfig"],
        "fastpeft.tuners.lora.layer": ["Embedding", "Linear", "LoraLayer"],
        "fastpeft.tuners.lora.model": ["LoraModel"],
    },
)
