"""Which generation options transformers' continuous batching honours: a part of continuous_batching.

It shows logits processors the last token of each request alone, drops some of them with a warning, and knows nothing of
the other ways to decode: an option that is not listed here would be ignored, or end the generation for everybody.
Read in the processors and the manager of the version that continuous_batching names.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

# What it does as generate does. The filters of a distribution are here that look at nothing but its scores.
_HONOURED = {
    "do_sample", "eos_token_id", "max_new_tokens", "num_return_sequences", "temperature", "top_k", "top_p", "top_h",
    "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "suppress_tokens", "renormalize_logits",
}  # fmt: skip

# What changes no token: how fast and in how much memory generate works, token ids that only fill up, what goes with
# beams or an assistant, which are refused, and a max_length, which comes after max_new_tokens.
_OF_NO_EFFECT = {
    "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "bos_token_id",
    "cache_config", "cache_implementation", "decoder_start_token_id", "disable_compile", "early_stopping",
    "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "pad_token_id", "prefill_chunk_size",
    "return_dict_in_generate", "target_lookbehind", "transformers_version", "use_cache",
}  # fmt: skip

_OFF = {  # values that ask for nothing, beside None and False
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0, "guidance_scale": 1.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
}  # fmt: skip


def check_options(base: Any, config: GenerationConfig) -> None:
    """Raise unless continuous batching honours everything that a generation config asks for.

    Args:
        base: the model inside the PeftModel.
        config: what it is to generate by, maybe its own.

    Raises:
        ValueError: an option would be ignored.
    """
    known = vars(GenerationConfig())  # what else a hub's file has in it, generate does not look at either
    asked = {
        name: value
        for name, value in vars(config).items()
        if name in known and not name.startswith("_") and name not in _HONOURED | _OF_NO_EFFECT
        if value is not None and value is not False and (name not in _OFF or value != _OFF[name])
    }
    if asked:
        whose = "the model's own generation_config" if config is base.generation_config else "generation_config"
        options = ", ".join(f"{name}={value!r:.80}" for name, value in sorted(asked.items()))
        raise ValueError(
            f"{whose} has options that continuous batching does not honour: {options}. Pass a generation_config "
            "without them, or call model.generate(adapter_names=[...]), which honours them"
        )
