"""`fastpeft.explain`: which path each adapter layer of a model takes, and why not a faster one."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastpeft_kernels.dispatch import use_triton

if TYPE_CHECKING:
    from fastpeft.tuners.tuners_utils import BaseTunerLayer


@dataclass(frozen=True)
class LayerPath:
    """What one adapter layer does in its next forward.

    Attributes:
        name: dotted path of the layer.
        adapters: the adapters it applies, in order.
        path: "fused" (one op owns the base product), "added" (the base module and one op), "plain" (modules only),
            or "base" (the base module alone: merged, disabled, or no active adapter here).
        backend: what runs the ops, "triton" or "torch"; "-" where no op of ours runs.
        shares: names of the siblings that the same op computes, because their parent calls them on the same tensor.
        why: why no faster path is taken; empty for "fused".
    """

    name: str
    adapters: tuple[str, ...]
    path: str
    backend: str
    shares: tuple[str, ...]
    why: str


class Explanation(tuple[LayerPath, ...]):
    """One LayerPath a layer, in the model's order; as text, a table with a line that counts the paths."""

    def __repr__(self) -> str:
        rows = [tuple(field.name for field in fields(LayerPath))]
        rows += [tuple(", ".join(v) if isinstance(v, tuple) else v for v in astuple(layer)) for layer in self]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts = Counter(layer.path for layer in self)
        total = ", ".join(f"{count} {path}" for path, count in counts.most_common()) or "no adapter layers"
        return "\n".join([*(lines if self else []), total])


def explain(model: nn.Module) -> Explanation:
    """Layer by layer, which path the adapters of a model take and why not the fused one.

    Inputs are taken to be in the base weight's dtype, without autocast. Printing the result gives a table.

    Args:
        model: a PeftModel, or any module that adapters were injected into.
    """
    from fastpeft.tuners.tuners_utils import BaseTunerLayer

    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return Explanation(_explain_layer(name, layer) for name, layer in layers)


def _explain_layer(name: str, layer: BaseTunerLayer) -> LayerPath:
    from fastpeft.tuners.ia3.layer import IA3Layer
    from fastpeft.tuners.lora.fused import path_of, sharing_siblings
    from fastpeft.tuners.lora.layer import LoraLayer

    if not isinstance(layer, LoraLayer | IA3Layer):
        return LayerPath(name, tuple(layer.active_adapters), "plain", "-", (), f"{type(layer).__name__} has no ops yet")
    available = layer._get_available_adapters()
    adapters = tuple(a for a in layer.active_adapters if a in available)
    if layer.disable_adapters:
        return LayerPath(name, adapters, "base", "-", (), "adapters are disabled")
    if layer.merged:
        return LayerPath(name, tuple(layer.merged_adapters), "base", "-", (), "merged into the base weight")
    if not adapters:
        return LayerPath(name, (), "base", "-", (), "no active adapter on this layer")
    shares: tuple[str, ...] = ()
    if isinstance(layer, IA3Layer):
        path, why = layer.path()
    else:
        path, why = path_of(layer, adapters)
        shares = sharing_siblings(layer)
    weight = layer.get_base_layer().weight
    backend = "-" if path == "plain" else "triton" if _runs_triton(weight) else "torch"
    return LayerPath(name, adapters, path, backend, shares, why)


def _runs_triton(weight: torch.Tensor) -> bool:
    try:
        return use_triton(weight)
    except RuntimeError:  # demanded and impossible: the forward will say so
        return True
