"""Gradients of gradients through whole models, against reference PEFT's: as close to fp64 as these."""

import warnings

import peft
import pytest
import torch
from numerics import assert_as_close_as_torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft

WIDTH, ROWS = 256, 1024  # fewer rows are left to torch's own gradients


class Attention(nn.Module):
    """Layers that share an input, one behind them, and a way around them all."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.checkpointed = False

    def layers(self, x):
        return self.o(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) + self.v(x))

    def forward(self, x):
        out = checkpoint(self.layers, x, use_reentrant=False) if self.checkpointed else self.layers(x)
        return x.square().mean() + torch.tanh(out).square().mean()


CONFIGS = {
    "lora": ("LoraConfig", {"target_modules": ["q", "k", "v", "o"], "init_lora_weights": False, "r": 4}),
    "dora": ("LoraConfig", {"target_modules": ["q", "o"], "init_lora_weights": False, "r": 4, "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["k", "v", "o"], "feedforward_modules": ["o"], "init_ia3_weights": False}),
}


def adapted(library, name, dtype=torch.float32):
    torch.manual_seed(0)
    base = Attention()
    torch.manual_seed(1)
    method, options = CONFIGS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, getattr(library, method)(**options)).to(dtype)


def second_derivatives(model, dtype=torch.float32):
    """The Hessian times a vector, and what a penalty on the gradients' norms trains."""
    generator = torch.Generator().manual_seed(2)
    x, v = (torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    found = {"hvp": torch.autograd.functional.hvp(model, x, v)[1]}
    trained = [p for p in model.parameters() if p.requires_grad]
    x.requires_grad_()
    grads = torch.autograd.grad(model(x), (x, *trained), create_graph=True)
    penalty = sum(g.square().sum() * ROWS for g in grads)
    second = torch.autograd.grad(penalty, (x, *trained))
    return found | {f"gradient {i}": g.detach() for i, g in enumerate((*grads, *second))}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_second_derivatives(name, checkpointed):
    ours, theirs, exact = adapted(fastpeft, name), adapted(peft, name), adapted(peft, name, torch.float64)
    assert "fused" in str(fastpeft.explain(ours))
    ours.base_model.model.checkpointed = checkpointed
    eager, wanted = second_derivatives(theirs), second_derivatives(exact, torch.float64)
    for key, found in second_derivatives(ours).items():
        assert_as_close_as_torch(f"{name}, {key}", found, eager[key], wanted[key])
