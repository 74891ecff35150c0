"""LoRA's tuner: which layer class a module gets, with which rank."""

import warnings
from typing import Any

from torch import nn

from fastpeft.tuners.bases import EmbeddingBase, base_for
from fastpeft.tuners.lora.config import LoraConfig
from fastpeft.tuners.lora.layer import Embedding, Linear, LoraLayer, check_adapter
from fastpeft.tuners.shared_inputs import regroup
from fastpeft.tuners.targets import resolve_pattern
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.tuners.tuners_utils import BaseTuner
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

    def _layers_changed(self, model: nn.Module) -> None:
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
