"""Batches of mixed adapters against reference PEFT's `adapter_names`, wherever it has them."""

import itertools

import pytest
import torch
from models import TARGETS, batch
from numerics import assert_as_close_as_torch
from pairs import exact_copy, output, pair

NAMES = ["other", "__base__", "default", "other", "third"]


def mixed(family, dtype=torch.float32, **options):
    """Three adapters of different ranks and scalings, one of them rank-stabilised."""
    targets = ["embed_tokens", "q_proj", "down_proj"] if family == "llama" else TARGETS[family]
    common = {"target_modules": targets, "init_lora_weights": False} | options
    both = pair(family, dtype, **common)
    both.add_adapter("other", r=3, lora_alpha=7, **common)
    both.add_adapter("third", r=17, use_rslora=True, **common)
    for model in both:
        model.eval()
    return both


def rows_of(family):
    return batch(family, rows=len(NAMES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_classifier"])
def test_outputs(family, dtype):
    both = mixed(family, dtype)
    theirs, ours = (model(**rows_of(family), adapter_names=NAMES).logits for model in both)
    exact = exact_copy(both.ours)(**rows_of(family), adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        assert_as_close_as_torch(f"{name} in row {row}", ours[row], theirs[row], exact[row], dtype=dtype)
    with both.ours.disable_adapter():
        assert torch.equal(ours[1], both.ours(**rows_of(family)).logits[1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=repr)
def test_generation(options):
    both = mixed("llama", modules_to_save=["lm_head"])
    for model in both:
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    inputs = {key: rows_of("llama")[key] for key in ("input_ids", "attention_mask")}
    theirs, ours = (
        model.generate(**inputs, adapter_names=NAMES, max_new_tokens=8, do_sample=False, **options) for model in both
    )
    assert torch.equal(ours, theirs)


def test_t5():
    both = pair("t5", init_lora_weights=False)
    both.add_adapter("other", r=3, target_modules=TARGETS["t5"], init_lora_weights=False)
    theirs, ours = (output(model.eval(), "t5", adapter_names=["other", "__base__", "default"]) for model in both)
    torch.testing.assert_close(ours, theirs)
    inputs = {key: batch("t5")[key] for key in ("input_ids", "attention_mask")}
    names = ["default", "other", "__base__"]
    # reference PEFT counts on an encoder that sees every row once, and a decoder that sees it once a beam
    theirs, ours = (
        model.generate(**inputs, adapter_names=names, max_new_tokens=6, num_beams=2, do_sample=False) for model in both
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_takes_the_counts_of_names_that_reference_peft_takes(family):
    """Else the beams of one prompt would take different adapters."""
    both = pair(family, target_modules=TARGETS[family], init_lora_weights=False)
    both.add_adapter("other", r=3, target_modules=TARGETS[family], init_lora_weights=False)
    inputs = {key: batch(family)[key][:2] for key in ("input_ids", "attention_mask")}
    pattern, refused = ["default", "other", "__base__", "other", "default", "default"], set()
    for beams, sequences, count in itertools.product((1, 2, 3), (1, 2), (1, 2, 4, 6)):
        if sequences > beams > 1:
            continue
        outcomes = []
        for model in both:
            torch.manual_seed(0)
            options = {"num_beams": beams, "num_return_sequences": sequences, "do_sample": sequences > beams}
            names = {"adapter_names": pattern[:count], "max_new_tokens": 4}
            try:
                outcomes.append(model.eval().generate(**inputs, **options, **names))
            except ValueError:
                outcomes.append(None)
        theirs, ours = outcomes
        if theirs is not None:
            assert torch.equal(ours, theirs), (beams, sequences, count)
        elif ours is None:
            refused.add((beams, sequences, count))
        else:  # one name a prompt for several returned sequences is an addition of ours
            assert (beams, sequences, count) == (1, 2, 2)
    assert {(2, 1, 1), (2, 1, 4), (2, 2, 4), (3, 2, 6)} <= refused


def test_merged_adapters_are_refused_by_both():
    both = mixed("llama")
    both.each("merge_adapter", adapter_names=["other"])
    for model in both:
        with pytest.raises(ValueError, match="merged"):
            model(**rows_of("llama"), adapter_names=NAMES)


def test_unknown_names_and_wrong_counts_are_refused_by_both():
    both = mixed("llama")
    for model in both:
        with pytest.raises(ValueError, match=r"nobody|typo"):
            model(**rows_of("llama"), adapter_names=["typo"] * len(NAMES))
        with pytest.raises(ValueError, match=r"adapter_names"):
            model(**rows_of("llama"), adapter_names=NAMES[:2])
