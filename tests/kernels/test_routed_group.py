"""Layers that share their input in a mixed batch: the bits of each by itself, with one shrink for all of them."""

from itertools import product

import pytest
import torch
from lora_operands import BACKENDS, DTYPES, LAYOUTS
from routed_operands import factors, one_each, routing

from fastpeft.benchmark.traffic import counting
from fastpeft_kernels import RoutedOperands, backend, lora_routed, lora_routed_group
from fastpeft_kernels.dispatch import interpreting
from fastpeft_kernels.tiles import routed_tile, split_columns

RANKS = ((3, 16, 1), (17, 4, 8), (8, 33, 2))  # of three slots, for each member
WIDTHS = (40, 33, 7)
WEIGHTED = [[(1, 0.3)], [(0, 0.7), (1, 0.25)], [], [(2, 1.0)], [(1, -0.5), (2, 2.0), (0, 0.1)]]
BATCHES = {
    "mixed": one_each([0, 2, -1, 1, 0, -1, 2]),
    "many-rows-of-a-slot": one_each([1] * 30 + [0, -1, 2]),
    "nobody": one_each([-1, -1, -1]),
    "weighted": WEIGHTED,
    "no-rows": [],
}


def make(rows, dtypes, device, K=72):
    wide, narrow = dtypes
    x = torch.randn(rows, K, device=device).to(wide)
    members = [
        RoutedOperands(
            torch.randn(rows, N, device=device).to(wide),
            factors(ranks, K, narrow, device),
            factors(ranks, N, narrow, device, transposed=True),
            (0.7, 1.3, 2.0 + N),
        )
        for ranks, N in zip(RANKS, WIDTHS, strict=True)
    ]
    return x, members


def one_by_one(x, members, tensors):
    return [lora_routed(base, x, As, Bs, scales, *tensors) for base, As, Bs, scales in members]


def assert_same_bits(ours, alone):
    assert len(ours) == len(alone)
    for out, other in zip(ours, alone, strict=True):
        assert torch.equal(out, other)
        assert out.dtype == other.dtype


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize(("batch", "dtypes"), [*product(BATCHES, DTYPES[1:2]), *product(["mixed"], DTYPES)], ids=str)
def test_each_member_has_the_bits_that_it_has_alone(path, batch, dtypes, device):
    entries = BATCHES[batch]
    tensors = routing(entries, 3, device)
    x, members = make(len(entries), dtypes, device)
    with backend(path), torch.no_grad():
        assert_same_bits(lora_routed_group(x, members, *tensors), one_by_one(x, members, tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, device):
    strided, tensors = LAYOUTS[layout], routing(BATCHES["mixed"], 3, device)
    x, members = make(7, (torch.bfloat16, torch.float32), device)
    x = strided(x)
    members = [
        RoutedOperands(strided(base), *([strided(t.detach()) for t in ts] for ts in (As, Bs)), scales)
        for base, As, Bs, scales in members
    ]
    with backend("triton"), torch.no_grad():
        assert_same_bits(lora_routed_group(x, members, *tensors), one_by_one(x, members, tensors))


@pytest.mark.parametrize("path", BACKENDS)
def test_gradients_are_those_of_the_members(path, device):
    tensors = routing(BATCHES["mixed"], 3, device)
    x, members = make(7, (torch.bfloat16, torch.float32), device)
    leaves = [x.requires_grad_(), *(t for member in members for t in (*member.As, *member.Bs))]
    grads = []
    for op in (lambda: lora_routed_group(x, members, *tensors), lambda: one_by_one(x, members, tensors)):
        with backend(path):
            grads.append(torch.autograd.grad([out.float().square().sum() for out in op()], leaves))
    assert all(grad.any() for grad in grads[0])
    assert_same_bits(*grads)


@pytest.mark.parametrize("path", BACKENDS)
def test_autocast_reads_a_narrow_x(path, device):
    tensors = routing(BATCHES["mixed"], 3, device)
    x, members = make(7, (torch.float32, torch.bfloat16), device)
    with backend(path), torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        ours, alone = lora_routed_group(x, members, *tensors), one_by_one(x, members, tensors)
    assert_same_bits(ours, alone)


@pytest.mark.parametrize("path", BACKENDS)
def test_a_compiler_sees_the_members(path, device):
    tensors = routing(BATCHES["mixed"], 3, device)
    x, members = make(7, (torch.bfloat16, torch.float32), device)
    compiled = torch.compile(lora_routed_group, fullgraph=True, backend="aot_eager")
    with backend(path), torch.no_grad():
        assert_same_bits(compiled(x, members, *tensors), one_by_one(x, members, tensors))


def launched(slots, members=3, op=lora_routed_group):
    """(kernels by name, their traffic) of members with `slots` adapters of rank 8, on 16 rows of 64 columns."""
    K, N, M, r = 64, 40, 16, 8
    tensors = routing(one_each([m % slots for m in range(M)]), slots, "cpu")
    x = torch.randn(M, K).bfloat16()
    parts = [
        RoutedOperands(
            torch.randn(M, N).bfloat16(),
            factors([r] * slots, K, torch.float32, "cpu"),
            factors([r] * slots, N, torch.float32, "cpu", transposed=True),
            [1.0] * slots,
        )
        for _ in range(members)
    ]
    with backend("triton"), torch.no_grad(), counting() as traffic:
        op(x, parts, *tensors)
    return traffic


@pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_launches_and_bytes(slots):
    """One shrink for all, whatever the number of adapters, each of which is read once."""
    K, N, M, r = 64, 40, 16, 8
    traffic = launched(slots)
    assert [launch.name for launch in traffic.launches] == ["_routed_shrink_kernel", *["_routed_expand_kernel"] * 3]
    shrink, *expands = traffic.launches
    assert shrink.reads["address from memory"] == 3 * slots * r * K * 4
    assert shrink.reads["x_ptr"] == 3 * M * K * 2  # of one tile together: the caches' business
    assert all(expand.reads["address from memory"] == slots * r * N * 4 for expand in expands)


@pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")
def test_a_shrink_for_each_layer_would_be_counted():
    """The test above is able to fail."""
    traffic = launched(4, op=one_by_one_of)
    assert [launch.name for launch in traffic.launches].count("_routed_shrink_kernel") == 3


def one_by_one_of(x, members, *tensors):
    return one_by_one(x, members, tensors)


def test_few_rows_split_k_as_alone(device):
    """The splits are a function of the rows: other members do not change the order of a sum."""
    x, members = make(3, (torch.bfloat16, torch.float32), device, K=600)
    tensors = routing(one_each([0, 1, -1]), 3, device)
    with backend("triton"), torch.no_grad():
        assert_same_bits(lora_routed_group(x, members, *tensors), one_by_one(x, members, tensors))
    assert split_columns(3, 600, routed_tile("shrink", 3))[1] > 1


@pytest.mark.parametrize("path", BACKENDS)
@torch.no_grad()
def test_errors(path, device):
    with backend(path):
        check_errors(device)


def check_errors(device):
    tensors = routing(BATCHES["mixed"], 3, device)
    x, members = make(7, (torch.bfloat16, torch.float32), device)
    first = members[0]
    with pytest.raises(ValueError, match="at least one member, got none"):
        lora_routed_group(x, [], *tensors)
    narrow = first._replace(As=[A.bfloat16() for A in first.As], Bs=[B.bfloat16() for B in first.Bs])
    with pytest.raises(ValueError, match=r"must be of one dtype; got torch\.bfloat16, torch\.float32"):
        lora_routed_group(x, [first, narrow], *tensors)
    with pytest.raises(ValueError, match=r"base must be \(M, N\) of x's 7 rows; got \(6, 40\)"):
        lora_routed_group(x, [first, first._replace(base=first.base[:6])], *tensors)
    with pytest.raises(ValueError, match="starts must be"):
        lora_routed_group(x, [first, first._replace(As=first.As[:2], Bs=first.Bs[:2])], *tensors)
    with pytest.raises(ValueError, match="scales needs one number a slot"):
        lora_routed_group(x, [first._replace(scales=[1.0])], *tensors)
