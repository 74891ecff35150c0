"""The passes of the torch path by themselves: every rank's way to multiply, one tile and many."""

import pytest
import torch

from fastpeft_kernels import low_rank
from fastpeft_kernels.masks import apply_mask, draw_mask

M, K = 130, 160
RANKS = [1, 8, low_rank.THIN, 40]  # thin ones are multiplied as rows of the transposed product
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.fixture(params=["one tile", "tiles", "few"])
def _tiles(request, monkeypatch):
    if request.param != "few":
        monkeypatch.setattr(low_rank, "MOST_ELEMENTS", 0)
    if request.param == "tiles":
        monkeypatch.setattr(low_rank, "TILE", 64 * 64)
        monkeypatch.setattr(low_rank, "TILE_COLUMNS", 64)


def _wide(dtype, layout):
    x = torch.randn(M, K).to(dtype)
    return x if layout == "dense" else x.t().contiguous().t()


def _close(ours, exact, dtype):
    assert (ours.dtype, ours.shape, ours.is_contiguous()) == (dtype, exact.shape, True)
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("_tiles")
def test_shrink(r, dtypes, layout, masked):
    wide, narrow = dtypes
    x, A = _wide(wide, layout), torch.randn(r, K).to(narrow)
    mask = draw_mask(M, K, 0.3, x.device) if masked else None
    dropped = x if mask is None else apply_mask(x, mask)
    _close(low_rank.shrink(x, A, mask, 0.5), 0.5 * dropped.double() @ A.double().t(), narrow)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.usefixtures("_tiles")
def test_output_pass(r, dtypes, layout):
    wide, narrow = dtypes
    dout, B, S = _wide(wide, layout), torch.randn(K, r).to(narrow), torch.randn(M, r).to(narrow)
    dS, dB = low_rank.output_pass(dout, B, S, 0.5)
    _close(dS, 0.5 * dout.double() @ B.double(), narrow)
    _close(dB, dout.double().t() @ S.double(), narrow)
