"""What a DoRA linear may move and launch beyond its base products, counted in Triton's interpreter: gpu/dora.py has the
terms. Without dropout it is a LoRA linear's budget, and 6MN + 2NK for the norm and the columns."""

import functools

import pytest
import torch

from fastpeft.benchmark.budget import by_kind, count_op
from fastpeft_kernels import dora_linear
from fastpeft_kernels.dispatch import interpreting

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter"),
    pytest.mark.usefixtures("small_bands"),
]

M, K, N, r = 146, 96, 160, 16  # two bands of rows, the last not full; K too small to be split
NARROW = 2 * N * K  # bytes of the smallest wide tensor, W: whatever torch's operators touch is smaller


@functools.cache
def counted(dropout, trained=True):
    x, W, dout = torch.randn(M, K).bfloat16().requires_grad_(), torch.randn(N, K).bfloat16(), torch.randn(M, N)
    A, B, magnitude = (torch.randn(*shape).requires_grad_(trained) for shape in ((r, K), (N, r), (N,)))
    op = lambda: [dora_linear(x, W, None, A, B, magnitude, 1.0, dropout)]  # noqa: E731
    return count_op(op, [dout.bfloat16()], [W])


def kernels(traffic):
    return [launch.name for launch in traffic.beside_base() if not launch.name.startswith("aten.")]


def budget(dropout):
    if dropout:
        return 20 * M * K + 14 * M * N + 2 * N * K + 4 * M * K // 8
    return 8 * M * K + 12 * M * N + 2 * N * K


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bytes(dropout):
    moved = by_kind(*counted(dropout), narrow=NARROW)
    assert moved.wide == budget(dropout)
    # S thrice and dS twice as in LoRA, A four times, B and T twelve times, forty vectors of N.
    assert moved.factors <= 20 * M * r + 16 * r * K + 48 * r * N + 40 * 4 * N


@pytest.mark.parametrize(("dropout", "forward_most", "backward_most"), [(0.0, 3, 5), (0.1, 5, 6)])
def test_kernels(dropout, forward_most, backward_most):
    """Beside them are torch's operators on N or N x r numbers, which `test_bytes` holds to be factors."""
    forward, backward = counted(dropout)
    assert len(kernels(forward)) <= forward_most, kernels(forward)
    assert len(kernels(backward)) <= backward_most, kernels(backward)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_frozen_adapter_reads_neither_x_nor_z(dropout):
    """Backward: the scaled dout, dS, and dx's C operand."""
    _, backward = counted(dropout, trained=False)
    last = ["_dropout_kernel"] if dropout else []
    assert kernels(backward) == ["_columns_kernel", "_shrink_kernel", "_expand_kernel", *last]
    assert not backward.arguments()["_columns_kernel.z_ptr"]
    wide = 2 * M * N * 3 + 2 * M * K * 2  # dout twice and scaled; dx and its C operand
    again = 2 * M * K * 3 + 2 * M * K // 8 if dropout else 0  # the masked part of dx, and the mask twice
    assert by_kind(backward, narrow=NARROW).wide == wide + again


def test_two_reads_of_dout_are_over_budget(monkeypatch):
    """The tests above are able to fail."""
    monkeypatch.setattr("fastpeft_kernels.gpu._lora_backward.fused_tile", lambda *args: None)
    moved = by_kind(*counted.__wrapped__(0.0), narrow=NARROW)
    assert moved.wide == budget(0.0) + 2 * M * N
