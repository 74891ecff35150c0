"""IA³'s tuner: which modules get a vector, and on which side."""

import re
import warnings
from typing import Any

from torch import Tensor, nn

from fastpeft.tuners.ia3.config import IA3Config
from fastpeft.tuners.ia3.layer import IA3Layer, Linear, linear_base_for
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.tuners.tuners_utils import BaseTuner
from fastpeft.utils.constants import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)


class IA3Model(BaseTuner):
    """A model with IA³ layers in it. arXiv:2205.05638."""

    prefix = "ia3_"
    tuner_layer_cls = IA3Layer
    target_module_mapping = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.feedforward_modules is None:
            model_type = model_config.get("model_type")
            default = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type)  # type: ignore[arg-type]
            if default is None:
                raise ValueError(
                    f"there are no default feedforward_modules for models of type {model_type!r}: name in the config "
                    "the target modules whose input is to be scaled, or [] for none"
                )
            peft_config.feedforward_modules = set(default)
        return peft_config

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        IA3Config.check(config)

    def _plan(
        self, config: Any, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None
    ) -> list[str]:
        targets = config.target_modules
        all_linear = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        keys = super()._plan(config, model, adapter_name, state_dict)
        names = config.feedforward_modules
        if not isinstance(names, set):
            return keys
        if unused := sorted(name for name in names if not any(key.endswith(name) for key in keys)):
            warnings.warn(f"feedforward_modules {unused} match no targeted module", RuntimeWarning, stacklevel=5)
        if all_linear:
            # target_modules are whole paths now. Reference PEFT reads the saved config only if these are a subset of
            # them, which names are not.
            config.feedforward_modules = {key for key in keys if is_feedforward(config, key)}
        return keys

    def _check_target(self, peft_config: Any, target: nn.Module, current_key: str) -> None:
        if not isinstance(target, IA3Layer):
            if isinstance(target, BaseTunerLayer):
                raise ValueError(
                    f"{current_key} has an adapter of another method ({type(target).__name__}); unload it first"
                )
            linear_base_for(target, current_key)
            return
        others = [name for name in target.ia3_l if self.peft_config.get(name) is not peft_config]
        target.check_side(is_feedforward(peft_config, current_key), others, current_key)

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
        feedforward = is_feedforward(peft_config, current_key)
        if isinstance(target, IA3Layer):
            target.update_layer(adapter_name, peft_config, feedforward)
            return
        layer = Linear(target, adapter_name, peft_config, feedforward, target_name=current_key)
        if peft_config.fan_in_fan_out and not layer.fan_in_fan_out:
            warnings.warn(
                f"fan_in_fan_out=True does not apply to {current_key}, an nn.Linear: its weight is (out, in)",
                stacklevel=5,
            )
        # as in PEFT, the saved config says how the weight of the last adapted layer is stored
        peft_config.fan_in_fan_out = layer.fan_in_fan_out
        layer.train(target.training)
        setattr(parent, target_name, layer)


def is_feedforward(config: Any, key: str) -> bool:
    """Whether an adapter scales the input of the module at this path. By its last letters, as in PEFT: "wo" is also the
    end of "two"."""
    names = config.feedforward_modules
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key.endswith(name) for name in names)
