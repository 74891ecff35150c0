"""LoRA's tuner: which layer class a module gets, with which rank."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from fastpeft.tuners.bases import EmbeddingBase, base_for
from fastpeft.tuners.lora.config import LoraConfig
from fastpeft.tuners.lora.layer import Embedding, Linear, LoraLayer, check_adapter
from fastpeft.tuners.shared_inputs import regroup
from fastpeft.tuners.targets import resolve_pattern
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.tuners.tuners_utils import BaseTuner
from fastpeft.utils.auxiliary import BASE, AuxiliaryTrainingWrapper
from fastpeft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


class LoraModel(BaseTuner):
    """A model with LoRA layers in it. arXiv:2106.09685."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        LoraConfig.check(config)

    def _check_target(self, peft_config: Any, target: nn.Module, current_key: str) -> None:
        if isinstance(target, BaseTunerLayer) and not isinstance(target, LoraLayer):
            raise ValueError(
                f"{current_key} has an adapter of another method ({type(target).__name__}); unload it first"
            )
        module = target.get_base_layer() if isinstance(target, LoraLayer) else target
        r = resolve_pattern(peft_config.rank_pattern, current_key, peft_config.r)
        base = base_for(module, current_key)
        check_adapter(base, module, r, peft_config, current_key)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        regroup(model, LoraLayer)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise NotImplementedError("target_parameters is not supported yet; target whole modules")
        r = resolve_pattern(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = resolve_pattern(peft_config.alpha_pattern, current_key, peft_config.lora_alpha)
        if isinstance(target, LoraLayer):
            target.update_layer(adapter_name, r, lora_alpha=alpha, config=peft_config, target_name=current_key)
            return
        layer = self._create_new_module(peft_config, adapter_name, target, r, alpha, current_key)
        setattr(parent, target_name, layer)

    @staticmethod
    def _create_new_module(
        config: Any, adapter_name: str, target: nn.Module, r: int, lora_alpha: float, current_key: str
    ) -> LoraLayer:
        base = base_for(target, current_key)
        if not isinstance(base, EmbeddingBase):
            if config.fan_in_fan_out and not base.fan_in_fan_out:
                warnings.warn(
                    f"fan_in_fan_out=True does not apply to {current_key}, an nn.Linear: its weight is (out, in)",
                    stacklevel=6,
                )
            # as in PEFT, the saved config says how the weight of the last adapted layer is stored
            config.fan_in_fan_out = base.fan_in_fan_out
        layer_cls = Embedding if isinstance(base, EmbeddingBase) else Linear
        layer = layer_cls(target, adapter_name, config=config, r=r, lora_alpha=lora_alpha, target_name=current_key)
        layer.train(target.training)
        return layer

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While this context lasts, every layer gets the `adapter_names` of a mixed batch, one name a row.

        Raises:
            ValueError: in training mode, or a name that no layer knows.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) and beams > 1 else 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        in_encoder = set(self._encoder_modules()) if beams > 1 else set()  # the encoder sees each input once
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
                    names = list(adapter_names) if module in in_encoder else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("adapter_names works at inference only: call model.eval() first")
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names needs one name per row of the batch, got the string {adapter_names!r}")
        known = {name for module in self.modules() if isinstance(module, LoraLayer) for name in module.r}
        unknown = sorted(set(adapter_names) - known - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names: no adapter {', '.join(map(repr, unknown))}; there are {', '.join(sorted(known))}, and "
                f"{BASE!r} for none"
            )

    def _encoder_modules(self) -> Iterator[nn.Module]:
        model: Any = self.model
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        if encoder is not None and encoder is not model:  # transformers: the model itself where there is none
            yield from encoder.modules()


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}
