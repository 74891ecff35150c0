"""Helpers under the names that PEFT gives them; imported when first asked for."""

from fastpeft.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fastpeft.utils.constants": [
            "CONFIG_NAME",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "SAFETENSORS_WEIGHTS_NAME",
            "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
            "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
            "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
            "UPCAST_DTYPES",
            "WEIGHTS_NAME",
        ],
        "fastpeft.utils.error": ["NoMatchingPeftModuleError", "PeftError"],
        "fastpeft.utils.warning": ["PeftWarning"],
        "fastpeft.utils.peft_types": ["PeftType", "TaskType", "register_peft_method"],
        "fastpeft.utils.other": [
            "AuxiliaryTrainingWrapper",
            "ModulesToSaveWrapper",
            "_freeze_adapter",
            "_get_batch_size",
            "_get_input_embeddings_name",
            "_get_submodules",
            "_is_valid_match",
            "_set_adapter",
            "_set_trainable",
            "cast_mixed_precision_params",
            "get_quantization_config",
            "id_tensor_storage",
            "infer_device",
            "prepare_model_for_kbit_training",
            "set_additional_trainable_modules",
            "shift_tokens_right",
            "transpose",
        ],
        "fastpeft.utils.save_and_load": [
            "get_peft_model_state_dict",
            "load_peft_weights",
            "set_peft_model_state_dict",
        ],
    },
)
