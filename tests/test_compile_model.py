"""torch.compile(model, fullgraph=True): one graph, and the numbers of eager, in every mode that training uses."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, tiny_llama
from numerics import assert_as_close_as_torch, assert_no_noisier_than_torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

import fastpeft
from fastpeft_kernels.masks import draw_mask


def adapted(dtype: torch.dtype, p: float, checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=p, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = fastpeft.get_peft_model(tiny_llama(dtype, use_cache=False), config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # a hook for the reentrant mode alone; the compiler refuses it
    return model


def run(model: nn.Module, forward: Callable[..., Any]) -> dict[str, Tensor]:
    inputs = batch("llama")
    out = forward(**inputs)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def compiled(model: nn.Module, counted: list[int]) -> Callable[..., Any]:
    """The model as one graph, or an error; `counted` gets an entry for each graph that is compiled."""
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: Any, example: Any) -> Any:
        counted.append(len(graph.graph.nodes))
        return compile_fx(graph, example)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.fixture
def masks_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that depend on their shape alone: compiled code may draw in another order than eager."""

    def draw(x: Tensor, p: float, copies: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(x.shape[0] * 1000 + x.shape[1])
            return draw_mask(copies * x.shape[0], x.shape[1], p, x.device)

    module = importlib.import_module("fastpeft_kernels.dropout")  # the package's `dropout` is the function
    monkeypatch.setattr(module, "_run_draw_mask", draw)


@pytest.mark.parametrize(
    ("mode", "checkpointing", "dtype"),
    [  # every mode with and without checkpointing, which there is in training only; either of these in either dtype
        ("eval", False, torch.float32),
        ("eval", False, torch.bfloat16),
        ("train", False, torch.bfloat16),
        ("train", True, torch.float32),
        ("dropout", False, torch.float32),
        ("dropout", True, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("masks_by_shape", "ops_for_few")  # eager would draw small masks in torch's own way
def test_numbers_of_eager(mode, checkpointing, dtype):
    """Outputs and gradients within twice eager's error, and one graph."""
    model = adapted(dtype, 0.3 if mode == "dropout" else 0.0, checkpointing).train(mode != "eval")
    eager_model, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    eager, exact = run(eager_model, eager_model), run(exact_model, exact_model)
    graphs: list[int] = []
    ours = run(model, compiled(model, graphs))
    assert len(graphs) == 1
    assert ours.keys() == eager.keys()
    for name in ("loss", "logits"):
        assert_as_close_as_torch(name, ours[name], eager[name], exact[name], dtype)
    del ours["loss"], eager["loss"], exact["loss"]  # one number, whose error is luck
    assert_no_noisier_than_torch(ours, eager, exact)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
# The compiler's caches do not see an op's tags: they would answer with a graph made before a tag went missing.
@functorch_config.patch(enable_autograd_cache=False)
@inductor_config.patch(fx_graph_cache=False)
def test_gradient_is_that_of_the_masks_drawn(checkpointing):
    """With real dropout: the gradient against finite differences of the compiled loss itself.

    The recomputation of a checkpoint must draw the masks of the forward. With an op that is not tagged as seeded, the
    compiler draws others: finite, plausible and wrong gradients.
    """
    model = adapted(torch.float64, 0.3, checkpointing).double().train()
    forward = compiled(model, [])
    inputs = batch("llama")

    def loss() -> Tensor:
        torch.manual_seed(7)
        return forward(**inputs).logits.square().mean()

    parameters = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in parameters]
    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
    step = 1e-3  # the model's norms compute in fp32 whatever its dtype
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
        values.append(loss().detach())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * step)
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-2, atol=0.0)


def test_one_graph_a_shape_class():
    """A second batch size makes one more graph, with a dynamic dimension; a third one makes none."""
    model = adapted(torch.float32, 0.0, False).eval()
    graphs: list[int] = []
    forward = compiled(model, graphs)
    with torch.no_grad():
        for rows in (2, 3, 5, 4):
            ids = torch.randint(3, 90, (rows, 6))
            torch.testing.assert_close(forward(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(graphs) <= 2
