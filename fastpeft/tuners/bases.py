"""The kinds of base layer, and what an adapter method must know of each.

One small class a kind, without state: every method takes the layer (or its module) it is asked about. `base_for` gives
the kind of a module, or says why there is none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUANTISED_WEIGHTS = ("Params4bit", "Int8Params")  # bitsandbytes' Parameter classes, by name: it may not be installed
LATER = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class Base:
    """A kind of base layer: sizes, the two LoRA factors beside it, and how its weight is stored.

    For an input of K features and an output of N, A is (r, K) and B is (N, r); the weight changes by
    scaling · B A, an (N, K) matrix, which `store` turns into the layout of the weight.
    """

    module_type: type[nn.Module]
    supports_lora_bias = True
    supports_dora = True
    fan_in_fan_out = False  # the weight is stored (K, N)

    def features(self, module: Any) -> tuple[int, int]:
        """(K, N)."""
        return module.in_features, module.out_features

    def create_factors(self, layer: Any, adapter: str, r: int, lora_bias: bool) -> None:
        """Make A and B, with torch's default initialisation, in the layer's containers."""
        layer.lora_A[adapter] = nn.Linear(layer.in_features, r, bias=False)
        layer.lora_B[adapter] = nn.Linear(r, layer.out_features, bias=lora_bias)

    def reset_factors(self, layer: Any, adapter: str, gaussian: bool) -> None:
        """A random, B zero: the adapter changes nothing at first.

        A is uniform in ±1/√K as nn.Linear's own weight, or with `gaussian` normal of standard deviation 1/r.
        """
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if gaussian:
            nn.init.normal_(A.weight, std=1 / layer.r[adapter])
        else:
            nn.init.kaiming_uniform_(A.weight, a=5**0.5)
        nn.init.zeros_(B.weight)
        if B.bias is not None:
            nn.init.zeros_(B.bias)

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, K) and B (N, r)."""
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def factor_bias(self, layer: Any, adapter: str) -> Tensor | None:
        """What `lora_bias=True` adds after B, before scaling: (N,)."""
        return layer.lora_B[adapter].bias

    def low_rank(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        """scaling · (drop(x) Aᵀ Bᵀ + bias), in the adapter's dtype or autocast's.

        Args:
            x: (..., K).
        """
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        x = layer._cast_input_dtype(x, A.weight.dtype)
        return B(A(layer.lora_dropout[adapter](x))) * layer.scaling[adapter]

    def store(self, delta: Tensor) -> Tensor:
        """A change (N, K) in the layout of the weight."""
        return delta.T if self.fan_in_fan_out else delta


class LinearBase(Base):
    """nn.Linear and its subclasses that keep a plain floating-point weight, stored (N, K)."""

    module_type = nn.Linear


class Conv1DBase(Base):
    """transformers' Conv1D, GPT-2's linear layer: the weight is stored (K, N)."""

    module_type = Conv1D
    fan_in_fan_out = True

    def features(self, module: Any) -> tuple[int, int]:
        K, N = getattr(module.weight, "ds_shape", module.weight.shape)  # DeepSpeed's name for the unsharded shape
        return K, N


class EmbeddingBase(Base):
    """nn.Embedding, K = vocabulary and N = dimension; the weight is stored (K, N).

    As in PEFT, A is zero and B standard normal at first whatever the initialisation asked for, and dropout is not
    applied: there is no input to drop.
    """

    module_type = nn.Embedding
    supports_lora_bias = False
    supports_dora = False
    fan_in_fan_out = True

    def features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def create_factors(self, layer: Any, adapter: str, r: int, lora_bias: bool) -> None:
        layer.lora_embedding_A[adapter] = nn.Parameter(torch.randn(r, layer.in_features))
        layer.lora_embedding_B[adapter] = nn.Parameter(torch.randn(layer.out_features, r))

    def reset_factors(self, layer: Any, adapter: str, gaussian: bool) -> None:
        nn.init.zeros_(layer.lora_embedding_A[adapter])
        nn.init.normal_(layer.lora_embedding_B[adapter])

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]

    def factor_bias(self, layer: Any, adapter: str) -> Tensor | None:
        return None

    def low_rank(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        """scaling · (Aᵀ[x] Bᵀ).

        Args:
            x: (...) integer ids.
        """
        A, B = self.factors(layer, adapter)
        module = layer.get_base_layer()
        rows = F.embedding(
            x,
            A.T,
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
        )
        out = rows @ B.T * layer.scaling[adapter]
        scale = self.embed_scale(module)
        return out if scale is None else out * scale.to(out.dtype)

    def embed_scale(self, module: Any) -> Tensor | None:
        """The factor that some models (Gemma) multiply their embeddings by inside the layer; the adapter must too."""
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, int | float):
            return torch.tensor(scale, device=module.weight.device, dtype=module.weight.dtype)
        if isinstance(scale, Tensor) and scale.numel() != 1:
            raise NotImplementedError(
                f"an embedding that scales its output by a tensor of shape {tuple(scale.shape)} cannot be adapted; "
                "expected a single number. Leave it out of target_modules."
            )
        return scale


BASES: tuple[Base, ...] = (EmbeddingBase(), LinearBase(), Conv1DBase())
SUPPORTED = "torch.nn.Linear, torch.nn.Embedding and transformers.pytorch_utils.Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this module."""
    return isinstance(module, nn.Linear | Conv1D)


def base_for(module: nn.Module, name: str = "") -> Base:
    """The kind of a base layer.

    Args:
        module: the module without any adapter on it.
        name: its path in the model, for the error.

    Raises:
        ValueError: no method can adapt this kind of module.
        NotImplementedError: one could, but this version does not yet.
    """
    kind = type(module).__name__
    where = f"{name} ({kind})" if name else kind
    if isinstance(module, LATER):
        raise NotImplementedError(f"adapting {where} is not supported yet; supported are {SUPPORTED}")
    base = next((base for base in BASES if isinstance(module, base.module_type)), None)
    if base is None:
        raise ValueError(f"{where} cannot be adapted; supported are {SUPPORTED}. Change target_modules.")
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise NotImplementedError(f"{where}: the output layer of MultiheadAttention is not supported yet")
    weight = module.weight
    packed = type(weight).__name__ in QUANTISED_WEIGHTS or type(weight).__module__.startswith("torchao")
    if packed or weight.dtype not in FLOAT_DTYPES:
        raise NotImplementedError(
            f"{where}: a quantised weight ({type(weight).__name__}, {weight.dtype}) is not supported yet; load the "
            "base model in fp32, bf16 or fp16"
        )
    if getattr(module, "_hf_tp_plan", None) is not None:
        raise NotImplementedError(
            f"{where}: a layer that is sharded by tensor parallelism is not supported yet; load without tp_plan"
        )
    return base
