"""Dropout at one bit an element."""

import pytest
import torch

from fastpeft_kernels import backend, dropout, masks
from fastpeft_kernels.dropout import _draw_mask, _dropout, draw_mask, dropout_scale

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 5, 129), (64, 128)], ids=str)
def test_forward_and_backward_share_a_mask(path, dtype, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    dout = torch.randn(shape, device=device, dtype=dtype)
    with backend(path):
        out = dropout(x, 0.3)
        out.backward(dout)
    kept = out.detach() != 0
    scale = dropout_scale(0.3)
    torch.testing.assert_close(out.detach(), torch.where(kept, x.detach().float() * scale, 0.0).to(dtype))
    torch.testing.assert_close(x.grad, torch.where(kept, dout.float() * scale, 0.0).to(dtype))


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 1 - 2**-16, 1e-9])
def test_share_of_dropped_elements(path, p, device):
    """Within five standard deviations of Bernoulli, and independent between rows and between the bits of a word."""
    M, K = 128, 1024
    with backend(path):
        mask = draw_mask(torch.empty(M, K, device=device), p)
    keep = masks.apply_mask(torch.ones(M, K, device=device), mask)
    expected = masks.keep_level(p) / masks.KEEP_LEVELS
    tolerance = 5 * (expected * (1 - expected) / (M * K)) ** 0.5
    assert abs(keep.mean().item() - expected) <= tolerance
    if tolerance and 0.02 < p < 0.98:
        deviation = (keep.view(-1, 32).mean(0) - expected).abs().max()  # each bit of a word by itself
        assert deviation <= tolerance * 32**0.5
        agreement = (keep[:, :-1] == keep[:, 1:]).float().mean()  # neighbours
        assert abs(agreement - (expected**2 + (1 - expected) ** 2)) < 0.01


@pytest.mark.parametrize("path", BACKENDS)
def test_masks_follow_the_seed_and_differ_from_call_to_call(path, device):
    x = torch.ones(64, 96, device=device)
    with backend(path):
        torch.manual_seed(1)
        first, second = dropout(x, 0.5), dropout(x, 0.5)
        torch.manual_seed(1)
        again = dropout(x, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("path", BACKENDS)
def test_dropped_elements_are_zero_even_when_not_finite(path, device):
    x = torch.full((32, 64), float("inf"), device=device)
    with backend(path):
        out = dropout(x, 0.5)
    assert set(out.unique().tolist()) == {0.0, float("inf")}


@pytest.mark.parametrize("path", BACKENDS)
def test_strides_and_no_rows(path, device):
    x = torch.randn(40, 33, device=device).t()
    with backend(path):
        out = dropout(x, 0.25)
        assert dropout(x[:0], 0.25).shape == (0, 40)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] * dropout_scale(0.25))


def test_fake_tensors_and_other_default_devices_leave_nothing_behind():
    """What the op keeps between calls is real, wherever the first call came from."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for _ in range(2):
        with backend("torch"), FakeTensorMode():
            assert dropout(torch.ones(4, 40, dtype=torch.float64), 0.3).shape == (4, 40)
        masks._kept_byte_lanes.cache_clear()
        x = torch.ones(4, 40, dtype=torch.float64)
        with torch.device("meta"):
            out = dropout(x, 0.3)
        assert set(out.unique().tolist()) <= {0.0, dropout_scale(0.3)}


def test_zero_is_the_identity(device):
    x = torch.randn(3, 4, device=device)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_errors(p, device):
    with pytest.raises(ValueError, match="0 <= p < 1"):
        dropout(torch.ones(2, 2, device=device), p)


@pytest.mark.parametrize("path", BACKENDS)
def test_opcheck(path, device):
    x = torch.randn(6, 40, device=device)
    mask = draw_mask(x, 0.3)
    with backend(path):
        torch.library.opcheck(_dropout, (x.clone().requires_grad_(), mask, 1.25))
        # Random by design: the comparison of two runs of it is left out.
        torch.library.opcheck(_draw_mask, (x, 0.3, 2), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in torch.ops.fastpeft.draw_mask.default.tags


def test_kept_for_backward_is_one_bit_an_element(device):
    saved: list[torch.Tensor] = []
    x = torch.randn(64, 256, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.1)
    assert sum(t.nbytes for t in saved) == x.numel() // 8


def test_scratch_memory_is_on_the_cpu_whatever_the_default_device():
    x = torch.randn(40, 64)
    with torch.device("meta"):
        assert dropout(x, 0.5).device.type == "cpu"
    assert dropout(x, 0.5).device.type == "cpu"
