"""What LoRA linears that share their input may move and launch beyond their base products, counted in the interpreter.

The budget of one forward and backward of n of them, N = Σ N_i: 8MK + 6MN bytes, as for one layer, 3nMK/8 with dropout,
and 2MK for each base product of dx but the first: it reads the sum of those before it, where autograd would read two
parts of dx and write a third (6MK).
"""

import functools

import pytest
import torch
from test_budget import assert_predicted

from fastpeft.benchmark.budget import by_kind, count_group
from fastpeft.benchmark.prediction import plane_bytes, predict
from fastpeft_kernels.dispatch import interpreting
from fastpeft_kernels.gpu import _lora_group as gpu

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter"),
    pytest.mark.usefixtures("small_bands"),
]

M, K = 146, 96  # two bands of rows, the last not full; K too small to be split
QKV, GATE_UP = (160, 64, 64), (192, 192)
counted = functools.cache(count_group)


def budget(Ns, dropout):
    n = len(Ns)
    return 8 * M * K + 6 * M * sum(Ns) + (n - 1) * 2 * M * K + (n * 3 * M * K // 8 if dropout else 0)


def names(traffic):
    return [launch.name for launch in traffic.beside_base()]


@pytest.mark.parametrize(
    ("Ns", "r", "dropout", "adapters"),
    [
        (QKV, 16, 0.1, torch.float32),
        (QKV, 4, 0.0, torch.float32),
        (GATE_UP, 16, 0.1, torch.bfloat16),
    ],
    ids=str,
)
def test_bytes_and_launches_of_a_group(Ns, r, dropout, adapters):
    forward, backward = counted(M, K, Ns, r, dropout, adapters)
    moved = by_kind(forward, backward)
    assert moved.wide == budget(Ns, dropout)
    assert moved.planes == plane_bytes(M, K, Ns, r, adapters)
    assert moved.planes <= sum(plane_bytes(M, K, [N], r, adapters) for N in Ns)
    if adapters == torch.float32:
        assert_predicted((forward, backward), predict(M, K, Ns, r, dropout))
    assert moved.factors <= sum(20 * M * r + 12 * r * (K + N) for N in Ns) + 64  # as much as the layers one by one
    assert len(names(forward)) <= 3 * len(Ns), names(forward)
    assert len(names(backward)) <= 4 * len(Ns), names(backward)


@pytest.mark.parametrize(("Ns", "r", "dropout"), [(QKV, 16, 0.1), (GATE_UP, 32, 0.1)], ids=str)
def test_x_is_read_once_each_way(Ns, r, dropout):
    forward, backward = counted(M, K, Ns, r, dropout, torch.float32)
    x, mask = 2 * M * K, M * K // 8
    assert names(forward).count("_group_shrink_kernel") == names(backward).count("_group_input_kernel") == 1
    assert forward.arguments()["_group_shrink_kernel.x_ptr"] == x
    assert backward.arguments()["_group_input_kernel.x_ptr"] == x
    assert backward.arguments()["_group_input_kernel.dx_ptr"] == x
    for traffic, kernel in ((forward, "_group_shrink_kernel"), (backward, "_group_input_kernel")):
        for i in range(len(Ns)):
            assert traffic.arguments()[f"{kernel}.mask{i}_ptr"] == (mask if dropout else 0)
    others = {"_shrink_kernel.x_ptr", "_outer_kernel.x_ptr", "_input_pass_kernel.x_ptr"}
    if r == 16:  # higher ranks read dout by these
        assert not others & (forward.arguments() + backward.arguments()).keys()


@pytest.mark.parametrize("rows", [1, 65])
def test_few_rows_split_k_at_no_launch_more(rows):
    forward, backward = count_group(rows, 384, QKV, 16)
    assert_predicted((forward, backward), predict(rows, 384, QKV, 16))
    assert names(forward) == ["_group_shrink_kernel", *["_expand_kernel"] * 3]


def test_what_does_not_fit_one_launch_takes_two():
    forward, backward = counted(M, K, QKV, 32, 0.0, torch.float32)
    assert len(names(forward)) <= 3 * len(QKV), names(forward)
    assert len(names(backward)) <= 4 * len(QKV), names(backward)
    assert forward.arguments()["_group_shrink_kernel.x_ptr"] == 2 * (2 * M * K)
    assert backward.arguments()["_group_input_kernel.x_ptr"] == 2 * (2 * M * K)


def test_a_pass_for_each_member_is_over_budget(monkeypatch):
    """The tests above are able to fail: as before the group had kernels of its own."""
    monkeypatch.setattr(gpu, "group_tile", lambda *args: None)
    assert by_kind(*count_group(M, K, QKV, 16)).wide >= budget(QKV, 0.0) + 2 * 2 * (2 * M * K)
