"""What a LoRA linear may move and launch beyond its base products, counted in Triton's interpreter.

The budget of one forward and backward: 8MK + 6MN bytes, and with dropout MK/8 each for the mask's drawing and its one
reading; planes of split reductions by themselves; A, B, S and their gradients once for each launch that reads or writes
them.
"""

import functools

import pytest
import torch

from fastpeft.benchmark.budget import by_kind, count
from fastpeft.benchmark.prediction import plane_bytes, predict
from fastpeft_kernels.dispatch import interpreting
from fastpeft_kernels.gpu import lora as gpu

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter"),
    pytest.mark.usefixtures("small_bands"),
]

counted = functools.cache(count)
M, K, N = 146, 96, 160  # two bands of rows, the last not full; K too small to be split


def budget(M: int, K: int, N: int, dropout: float) -> int:
    return 8 * M * K + 6 * M * N + (2 * M * K // 8 if dropout else 0)


def names(traffic):
    return [launch.name for launch in traffic.beside_base()]


def assert_predicted(counted, predicted):
    """Predicted times come out of these counts: of none of the shapes that the coefficients were found at."""
    for traffic, ours in zip(counted, predicted, strict=True):
        moved = by_kind(traffic)
        assert ours.wide == moved.wide
        assert ours.factors + ours.planes == pytest.approx(moved.factors + moved.planes, abs=64)  # 64: a seed


@pytest.mark.parametrize(
    ("r", "dropout", "adapters"),
    [(16, 0.0, torch.float32), (16, 0.1, torch.float32), (16, 0.1, torch.bfloat16), (4, 0.1, torch.float32)],
    ids=str,
)
def test_bytes_of_a_layer(r, dropout, adapters):
    forward, backward = counted(M, K, N, r, dropout, adapters)
    moved = by_kind(forward, backward)
    assert moved.wide == budget(M, K, N, dropout)
    assert moved.planes == plane_bytes(M, K, [N], r, adapters)
    assert moved.factors <= 20 * M * r + 12 * r * (K + N) + 64  # five of M x r in fp32, A three times, B three times
    if adapters == torch.float32:
        assert_predicted((forward, backward), predict(M, K, [N], r, dropout))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bytes_of_a_layer_with_our_own_product(dropout):
    """No C operand: 4MK + 2MN, and MK/8 for each of draw, dA and dx. Neither product moves more than the frozen one."""
    forward, backward = count(M, K, N, 16, dropout, product_by="own")
    moved = by_kind(forward, backward)
    assert moved.wide == 4 * M * K + 2 * M * N + (3 * M * K // 8 if dropout else 0)
    assert forward.c_reads == backward.c_reads == 0
    assert_predicted((forward, backward), predict(M, K, [N], 16, dropout, "own"))
    (product,), (dx_product,) = ([launch for launch in t.launches if launch.is_base] for t in (forward, backward))
    assert product.own["out_desc"] == 2 * M * N
    assert dx_product.own["out_desc"] == 2 * M * K
    assert product.arguments.keys() <= {"s_ptr", "b_ptr"}
    assert dx_product.arguments["mask_ptr"] == (M * K // 8 if dropout else 0)
    assert len(names(forward)) <= 2 + (dropout > 0), names(forward)
    assert len(names(backward)) <= 4, names(backward)


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 2), (0.1, 3)])
@pytest.mark.parametrize("r", [16, 64])
def test_launches(r, dropout, most):
    """With dropout the forward also draws a seed. Ranks over 16 read dout twice."""
    forward, backward = count(M, K, 128, r, dropout)  # N too small to be split, as with many rows
    assert by_kind(forward, backward).wide == budget(M, K, 128, dropout) + (2 * M * 128 if r > 16 else 0)
    assert len(names(forward)) <= most, names(forward)
    assert len(names(backward)) <= 4, names(backward)


@pytest.mark.parametrize("rows", [1, 65])
def test_launches_of_few_rows(rows):
    """Few rows split K: whoever reads S sums its planes, and no launch is added."""
    forward, backward = count(rows, 384, N, 16, 0.1)
    assert len(names(forward)) <= 3, names(forward)
    assert len(names(backward)) <= 4, names(backward)
    assert_predicted((forward, backward), predict(rows, 384, [N], 16, 0.1))


def test_each_wide_tensor_is_read_as_often_as_it_must():
    forward, backward = counted(M, K, N, 16, 0.1, torch.float32)
    x, out, mask = 2 * M * K, 2 * M * N, M * K // 8
    assert forward.arguments()["_shrink_kernel.x_ptr"] == x
    assert forward.arguments()["_shrink_kernel.mask_ptr"] == mask
    assert forward.arguments()["_expand_kernel.out_ptr"] == out
    assert forward.c_reads == out
    assert backward.arguments()["_output_pass_kernel.dout_ptr"] == out
    assert backward.arguments()["_input_pass_kernel.x_ptr"] == x
    assert backward.arguments()["_input_pass_kernel.mask_ptr"] == mask
    assert backward.arguments()["_input_pass_kernel.dx_ptr"] == x
    assert backward.c_reads == x


def test_planes_stay_within_a_quarter_of_the_budget():
    rows, columns = 8192, 4096
    assert plane_bytes(rows, columns, [columns], 16) <= 0.25 * budget(rows, columns, columns, 0.0)


def test_ranks_without_a_formula_are_refused():
    with pytest.raises(ValueError, match="ranks of 1 to 16"):
        predict(8192, 4096, [4096], r=32)


@pytest.mark.parametrize(
    "extra", [lambda dx: dx.clone(), lambda dx: dx.add_(0.0), lambda dx: dx.float()], ids=["copy", "sum", "cast"]
)
def test_one_pass_more_is_over_budget(extra, monkeypatch):
    """The tests above are able to fail: one more operator of size M x K anywhere."""
    original = gpu.input_pass

    def wasteful(*args):
        dx, planes = original(*args)
        extra(dx)
        return dx, planes

    monkeypatch.setattr(gpu, "input_pass", wasteful)
    forward, backward = count(M, K, N, 16)
    assert by_kind(forward, backward).wide > budget(M, K, N, 0.0)
    assert len(names(backward)) > 4


def test_two_reads_of_dout_are_over_budget(monkeypatch):
    """As before the output pass was one pass."""
    monkeypatch.setattr("fastpeft_kernels.gpu._lora_backward.fused_tile", lambda *args: None)
    assert by_kind(*count(M, K, N, 16)).wide == budget(M, K, N, 0.0) + 2 * M * N
