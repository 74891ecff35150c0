"""The backward's kernels by themselves: one pass or two, planes and their sums."""

import pytest
import torch

from fastpeft_kernels.dispatch import interpreting
from fastpeft_kernels.gpu._lora_backward import input_pass, outer, output_pass
from fastpeft_kernels.gpu._lora_forward import expand_planes, shrink, shrink_planes
from fastpeft_kernels.gpu._planes import sum_planes
from fastpeft_kernels.gpu.dropout import draw_mask
from fastpeft_kernels.masks import apply_mask, begin_draw
from fastpeft_kernels.masks import draw_mask as draw_in_torch
from fastpeft_kernels.tiles import PROGRAMS, ROWS_PER_PLANE, fused_tile, row_bands

DTYPES = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]
pytestmark = pytest.mark.skipif(not (interpreting() or torch.cuda.is_available()), reason="needs Triton")


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    scale = exact.abs().max().item() or 1.0
    eps = 4 * torch.finfo(ours.dtype).eps if ours.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=eps * scale)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("r", [8, 16, 24, 64, 80])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.usefixtures("small_bands")
def test_output_pass(dtypes, r, contiguous, device):
    """As one kernel (r up to 16, contiguous) and as two; several strips and bands, neither of them full."""
    M, N = 146, 150
    wide, narrow = dtypes
    dout = torch.randn(M, N, device=device).to(wide)
    dout = dout if contiguous else dout.t().contiguous().t()
    B, S = torch.randn(N, r, device=device).to(narrow), torch.randn(M, r, device=device).to(narrow)
    dS, planes = output_pass(dout, B, S, 0.5)
    (dB,) = sum_planes(planes, dtype=narrow)
    assert (dS.dtype, dB.dtype) == (narrow, narrow)
    close(dS, 0.5 * dout.double() @ B.double())
    close(dB, dout.double().t() @ S.double())
    again, planes_again = output_pass(dout, B, S, 0.5)
    assert torch.equal(dS, again)
    assert torch.equal(planes, planes_again)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("r", [8, 32, 64, 80])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("small_bands")
def test_input_pass(dtypes, r, masked, device):
    M, K = 146, 150
    wide, narrow = dtypes
    x, A = torch.randn(M, K, device=device).to(wide), torch.randn(r, K, device=device).to(narrow)
    dS = torch.randn(M, r, device=device).to(narrow)
    mask = draw_in_torch(M, K, 0.3, torch.device(device)) if masked else None
    keep = torch.ones(M, K, device=device) if mask is None else apply_mask(x.new_ones(M, K).float(), mask)
    dx, planes = input_pass(x, dS, A, mask)
    close(dx, dS.double() @ A.double() * keep)
    (dA,) = sum_planes(planes, dtype=narrow)
    close(dA, dS.double().t() @ (x.double() * keep))
    close(outer(x, dS, mask), dA.double())


@pytest.mark.parametrize("p", [0.3, 1e-9])
@pytest.mark.parametrize(("M", "K", "r"), [(7, 33, 4), (130, 96, 24), (65, 300, 80)])
def test_a_mask_drawn_on_the_way_is_the_one_drawn_alone(M, K, r, p, device):
    """Whatever the tile, the splits of K and the blocks of the rank."""
    x, A = torch.randn(M, K, device=device).bfloat16(), torch.randn(r, K, device=device)
    torch.manual_seed(5)
    alone = draw_mask(M, K, p, x.device)
    torch.manual_seed(5)
    draw = begin_draw(M, K, p, x.device)
    S = shrink(x, A, draw, 0.5)
    assert torch.equal(draw.mask, alone)
    close(S, 0.5 * apply_mask(x, alone).double() @ A.double().t())


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("r", [16, 80])
def test_planes_of_s_are_summed_where_they_are_read(dtypes, r, device):
    M, K, N = 33, 300, 200
    wide, narrow = dtypes
    x, A = torch.randn(M, K, device=device).to(wide), torch.randn(r, K, device=device).to(narrow)
    B = torch.randn(N, r, device=device).to(narrow)
    planes = shrink_planes(x, A, None, 0.5)
    assert len(planes) > 1
    out, S = expand_planes(planes, B, wide)
    close(S, 0.5 * x.double() @ A.double().t())
    close(S, shrink(x, A, None, 0.5).double())
    close(out, S.double() @ B.double().t())


def test_sums_of_planes(device):
    first, second = torch.randn(19, 7, 50, device=device), torch.randn(3, 1000, device=device)
    sums = sum_planes(first, second, dtype=torch.float32)
    for ours, planes in zip(sums, (first, second), strict=True):
        assert ours.shape == planes.shape[1:]
        close(ours, planes.double().sum(0))
    single = torch.randn(1, 5, device=device)
    alone, both = sum_planes(single, second, dtype=torch.bfloat16)
    assert alone.data_ptr() == single.data_ptr()  # its own sum
    assert both.dtype == torch.bfloat16
    assert sum_planes(torch.empty(3, 0, 4, device=device), dtype=torch.float32)[0].shape == (0, 4)


@pytest.mark.parametrize("M", [0, 1, 511, 512, 513, 8192, 100_000])
@pytest.mark.parametrize("strips", [1, 8, 100, 1000])
def test_bands_cover_all_rows_once(M, strips):
    bands, rows = row_bands(M, strips, 64)
    assert rows % 64 == 0
    assert (bands - 1) * rows < max(M, 1) <= bands * rows
    assert bands <= max(1, -(-M // ROWS_PER_PLANE))
    assert (bands - 1) * strips < PROGRAMS


def test_ranks_of_more_than_one_block_take_two_kernels():
    assert fused_tile("input_pass", torch.bfloat16, torch.float32, 64) is not None
    assert fused_tile("input_pass", torch.bfloat16, torch.float32, 65) is None
    assert fused_tile("output_pass", torch.bfloat16, torch.float32, 17) is None
