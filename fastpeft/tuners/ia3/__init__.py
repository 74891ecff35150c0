"""IA³: learned vectors that scale what layers take or give. arXiv:2205.05638."""

from fastpeft.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fastpeft.tuners.ia3.config": ["IA3Config"],
        "fastpeft.tuners.ia3.layer": ["IA3Layer", "Linear"],
        "fastpeft.tuners.ia3.model": ["IA3Model"],
    },
)
