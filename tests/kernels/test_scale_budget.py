"""What the column scale of IA3 may move and launch, counted in Triton's interpreter."""

import pytest
import torch

from fastpeft.benchmark.budget import by_kind, count_op
from fastpeft_kernels import scale_columns, scale_linear
from fastpeft_kernels.dispatch import interpreting
from fastpeft_kernels.gpu import scale as gpu

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")

M, K, N = 600, 96, 160
PLANES = -(-M // gpu.BLOCK_M)  # fewer rows than would fill the most planes there are


def counted(op, width, trained=("x", "scale")):
    x = torch.randn(M, width).bfloat16().requires_grad_("x" in trained)
    scale, W = torch.randn(width).requires_grad_("scale" in trained), torch.randn(N, K).bfloat16()
    if op is scale_columns:
        return count_op(lambda: [scale_columns(x, scale)], [torch.randn(M, width).bfloat16()], [])
    return count_op(lambda: [scale_linear(x, scale, W)], [torch.randn(M, N).bfloat16()], [W])


@pytest.mark.parametrize(("op", "width"), [(scale_columns, N), (scale_linear, K)], ids=["output", "input"])
def test_bytes_and_launches(op, width):
    forward, backward = counted(op, width)
    wide, row = 2 * M * width, 4 * width
    moved = [by_kind(part, narrow=wide) for part in (forward, backward)]
    assert [part.wide for part in moved] == [2 * wide, 3 * wide]
    assert moved[1].planes == PLANES * row
    assert sum(part.factors for part in moved) <= (3 * PLANES + 1) * row  # scale twice, once a tile; the planes' sum
    assert [len(part.beside_base()) for part in (forward, backward)] == [1, 2]


@pytest.mark.parametrize(("trained", "tensors"), [(("x",), 2), (("scale",), 2)], ids=str)
def test_what_is_not_asked_for_is_not_moved(trained, tensors):
    _, backward = counted(scale_columns, N, trained)
    assert by_kind(backward, narrow=2 * M * N).wide == tensors * 2 * M * N


def test_one_pass_more_is_over_budget(monkeypatch):
    """The tests above are able to fail."""
    original = gpu._gradients
    monkeypatch.setattr(gpu, "_gradients", lambda dout, *rest: original(dout.clone(), *rest))
    _, backward = counted(scale_columns, N)
    assert by_kind(backward, narrow=2 * M * N).wide == 5 * 2 * M * N
