"""Tiny random models of the four families that the tests run on, and a batch for each.

Every builder takes a dtype and a seed: the same two give the same weights, so a test can build one model for the
reference library and one for this one. The sizes are small, odd where the architecture allows it, and never square, so
that a swapped axis cannot go unseen.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 97
LAYERS = 2


def _build(model_class: type, config: Any, dtype: torch.dtype, seed: int) -> nn.Module:
    """A model with weights drawn in fp32 from `seed`, in eval mode, then cast: dtypes differ by rounding alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at one and biases at zero: make them tell on a mistake
                nn.init.normal_(parameter, mean=float(parameter.data.mean()), std=0.05)
    return model.to(dtype).eval()


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """LlamaForCausalLM: 2 layers, hidden 32, intermediate 56, 4 heads over 2 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _build(LlamaForCausalLM, LlamaConfig(**options | overrides), dtype, seed)


def tiny_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """GPT2LMHeadModel, the family whose linears are transformers' Conv1D: weights stored (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options = {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _build(GPT2LMHeadModel, GPT2Config(**options | overrides), dtype, seed)


def _bert_config(**overrides: Any) -> Any:
    from transformers import BertConfig

    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
        "num_labels": 3,
    }
    return BertConfig(**options | overrides)


def tiny_bert(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """BertModel, for feature extraction."""
    from transformers import BertModel

    return _build(BertModel, _bert_config(**overrides), dtype, seed)


def tiny_bert_classifier(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """BertForSequenceClassification with 3 labels; its head is `classifier`."""
    from transformers import BertForSequenceClassification

    return _build(BertForSequenceClassification, _bert_config(**overrides), dtype, seed)


def tiny_bert_tagger(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """BertForTokenClassification with 3 labels; its head is `classifier`."""
    from transformers import BertForTokenClassification

    return _build(BertForTokenClassification, _bert_config(**overrides), dtype, seed)


def tiny_bert_qa(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """BertForQuestionAnswering; its head is `qa_outputs`."""
    from transformers import BertForQuestionAnswering

    return _build(BertForQuestionAnswering, _bert_config(num_labels=2, **overrides), dtype, seed)


def tiny_t5(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """T5ForConditionalGeneration, one encoder and one decoder stack of 2 layers."""
    from transformers import T5Config, T5ForConditionalGeneration

    options = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": LAYERS,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "initializer_factor": 0.3,
    }
    return _build(T5ForConditionalGeneration, T5Config(**options | overrides), dtype, seed)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "bert_classifier": tiny_bert_classifier,
    "bert_tagger": tiny_bert_tagger,
    "bert_qa": tiny_bert_qa,
    "t5": tiny_t5,
}

# The linears that PEFT's own default mapping names for each family, in full so that every kind is exercised.
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value"],
    "bert_classifier": ["query", "value"],
    "bert_tagger": ["query", "value"],
    "bert_qa": ["query", "value"],
    "t5": ["q", "v", "wo"],
}

TASK_TYPES: dict[str, str] = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert": "FEATURE_EXTRACTION",
    "bert_classifier": "SEQ_CLS",
    "bert_tagger": "TOKEN_CLS",
    "bert_qa": "QUESTION_ANS",
    "t5": "SEQ_2_SEQ_LM",
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """The tiny model of a family, by its name in BUILDERS."""
    return BUILDERS[family](dtype=dtype, seed=seed, **overrides)


def batch(family: str, rows: int = 3, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of one forward, labels included where the family's head has a loss.

    Returns:
        input_ids and attention_mask, (rows, length) int64, the last row padded by 3 tokens; and the family's labels.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, length - 3 :] = 0
    inputs = {"input_ids": integers(3, VOCAB, (rows, length)), "attention_mask": mask}
    if family in ("llama", "gpt2"):
        inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
    elif family == "bert_classifier":
        inputs["labels"] = integers(0, 3, (rows,))
    elif family == "bert_tagger":
        inputs["labels"] = integers(0, 3, (rows, length)).masked_fill(mask == 0, -100)
    elif family == "bert_qa":
        inputs["start_positions"] = integers(0, length - 3, (rows,))
        inputs["end_positions"] = integers(0, length - 3, (rows,))
    elif family == "t5":
        inputs["labels"] = integers(3, VOCAB, (rows, length - 4))
    elif family != "bert":
        raise ValueError(f"no such family: {family!r}; expected one of {', '.join(BUILDERS)}")
    return inputs
