"""Activation checkpointing under mixed rows: what is computed again in backward takes the forward's adapters."""

import pytest
import torch
from joint_runs import joint, logged, make_model, rows
from models import batch

from fastpeft.joint import AdapterTraining


def gradients(model, names):
    """Gradients of all trainable parameters; the rows count differently, so that a swapped row shows."""
    inputs = batch("llama", rows=4)
    labels = inputs.pop("labels")
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # of the dropout masks
    logits = model(**inputs, adapter_names=names).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(1)
    (losses * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_without_checkpointing(use_reentrant, dropout):
    model = make_model("wxy", dropout=dropout).train()
    model.set_requires_grad(["w", "x", "y"], True)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.1)
    names = ["x", "__base__", "w", "x"]
    wanted = gradients(model, names)
    assert any(".w." in key for key in wanted)
    assert any(".x." in key for key in wanted)

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.prepare_model_for_gradient_checkpointing(model.get_base_model())
    found = gradients(model, names)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    assert not any(found[key].any() for key in found.keys() - wanted.keys())  # y has no rows


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_joint_run_with_checkpointing_is_the_run_without(use_reentrant, tmp_path):
    trainings = {name: AdapterTraining(train_dataset=rows(6, seed)) for seed, name in enumerate("wx")}
    plain = joint(tmp_path, trainings)
    plain.train()
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    saving = joint(tmp_path, trainings, **kwargs)
    saving.train()
    assert saving.model.get_base_model().is_gradient_checkpointing
    for name in "wx":
        assert logged(saving, f"loss/{name}") == pytest.approx(logged(plain, f"loss/{name}"), rel=1e-5)
