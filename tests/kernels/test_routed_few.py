"""Few rows without gradients: as close to fp64 as each row by itself, however factors lie and rows are spread."""

import pytest
import torch
from lora_operands import DTYPES
from numerics import assert_as_close_as_torch
from routed_operands import by_row_add, factors, laid_side_by_side, one_each, routing

from fastpeft_kernels import backend, lora_routed, routed_few
from fastpeft_kernels.routed_passes import put_rows_

K, N = 33, 40
SCALES = (0.7, 1.3, 0.4, 2.0, 1.1, 0.9, 0.3, 1.7)


@pytest.fixture
def ways(monkeypatch):
    """How slots were computed, in order: (how, number of slots)."""
    seen = []
    one_by_one = routed_few._slot_by_slot_

    class Spy(routed_few.Products):
        def __init__(self, A, B, scales, layout):
            super().__init__(A, B, scales, layout)
            self.slots = len(scales)

        def add_to_(self, out, x):
            seen.append(("together", self.slots))
            super().add_to_(out, x)

    def spy(out, x, As, Bs, scales, taken):
        seen.append(("slot by slot", len(taken.segments)))
        one_by_one(out, x, As, Bs, scales, taken)

    monkeypatch.setattr(routed_few, "Products", Spy)
    monkeypatch.setattr(routed_few, "_slot_by_slot_", spy)
    return seen


TOGETHER = {  # ranks, places in memory, slot of each row, how they are computed
    "in-order": ([4] * 3, [0, 1, 2], [0, 0, 1, 1, 2, 2], [("together", 3)]),
    "one-row-each": ([4] * 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [("together", 5)]),
    "mixed-up": ([4] * 3, [0, 1, 2], [2, 0, 1, 1, 0, 2], [("together", 3)]),
    "places-mixed-up": ([4] * 3, [2, 0, 1], [0, 0, 1, 1, 2, 2], [("together", 3)]),
    "uneven": ([4] * 3, [0, 1, 2], [2, 0, 1, 1, 0], [("together", 3)]),
    "base-rows": ([4] * 3, [0, 1, 2], [-1, 2, 0, -1, 1], [("together", 3)]),
    "many-base-rows": ([4] * 3, [0, 1, 2], [-1, -1, 2, -1, 0, -1, -1, 1], [("together", 3)]),
    "gaps": ([4] * 3, [1, 4, 5], [0, 0, 2, 2, 1, 1], [("together", 3)]),
    "an-empty-slot": ([4] * 4, [0, 1, 2, 3], [3, 0, 2, 3], [("together", 3)]),
    "two-ranks": ([4, 9] * 4, [0, 0, 1, 1, 2, 2, 3, 3], list(range(8)) * 2, [("together", 4)] * 2),
    "too-far-apart": ([4] * 3, [0, 4, 30], [0, 1, 2], [("slot by slot", 3)]),
    "too-uneven": ([4] * 3, [0, 1, 2], [0] * 8 + [1, 2], [("slot by slot", 3)]),
    "few-of-a-rank": ([4, 9, 4], [0, 0, 1], [0, 1, 2], [("slot by slot", 3)]),
    "one-slot": ([4] * 3, [0, 1, 2], [1, 1, -1], [("together", 1)]),
}


@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.parametrize("same_scale", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(case, same_scale, overwrite, dtypes, ways):
    ranks, places, slots, wanted = TOGETHER[case]
    wide, narrow = dtypes
    torch.manual_seed(0)
    base, x = torch.randn(len(slots), N).to(wide), torch.randn(len(slots), K).to(wide)
    As, Bs = factors(ranks, K, narrow, "cpu"), factors(ranks, N, narrow, "cpu", transposed=True)
    scales = [0.7] * len(ranks) if same_scale else SCALES[: len(ranks)]
    entries = one_each(slots)
    eager = by_row_add(base, x, As, Bs, scales, entries)
    exact = by_row_add(base.double(), x.double(), [A.double() for A in As], [B.double() for B in Bs], scales, entries)
    with torch.no_grad(), backend("torch"):
        As, Bs = laid_side_by_side(As, places), laid_side_by_side(Bs, places)
        given = base.clone()
        ours = lora_routed(given, x, As, Bs, scales, *routing(entries, len(ranks), "cpu"), overwrite=overwrite)
    assert ways == wanted
    assert (ours is given) == overwrite
    assert_as_close_as_torch("out", ours, eager.detach(), exact.detach())
    for row, slot in enumerate(slots):
        assert slot >= 0 or torch.equal(ours[row], base[row])


def test_strided_rows(ways):
    """Rows and outputs of any strides."""
    base, x = torch.randn(6, 2 * N)[:, ::2], torch.randn(K, 6).t()
    As, Bs = factors([4] * 3, K, torch.float32, "cpu"), factors([4] * 3, N, torch.float32, "cpu", transposed=True)
    entries = one_each([0, 0, 1, 1, 2, 2])
    with torch.no_grad(), backend("torch"):
        As, Bs = laid_side_by_side(As, [0, 1, 2]), laid_side_by_side(Bs, [0, 1, 2])
        ours = lora_routed(base, x, As, Bs, SCALES[:3], *routing(entries, 3, "cpu"))
        wanted = by_row_add(base, x, As, Bs, SCALES[:3], entries)
    assert ways == [("together", 3)]
    torch.testing.assert_close(ours, wanted)


def test_factors_that_lie_differently_are_taken_one_by_one(ways):
    """lora_B in another order than lora_A."""
    base, x = torch.randn(3, N), torch.randn(3, K)
    As, Bs = factors([4] * 3, K, torch.float32, "cpu"), factors([4] * 3, N, torch.float32, "cpu", transposed=True)
    entries = one_each([0, 1, 2])
    with torch.no_grad(), backend("torch"):
        As, Bs = laid_side_by_side(As, [0, 1, 2]), laid_side_by_side(Bs, [0, 2, 1])
        ours = lora_routed(base, x, As, Bs, SCALES[:3], *routing(entries, 3, "cpu"))
        wanted = by_row_add(base, x, As, Bs, SCALES[:3], entries)
    assert ways == [("slot by slot", 3)]
    torch.testing.assert_close(ours, wanted)


def many(counts, places, ways):
    """The error of so many rows of each slot, mixed up."""
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)][::-1]
    n = len(counts)
    base, x = torch.randn(len(slots), N), torch.randn(len(slots), K)
    As, Bs = factors([4] * n, K, torch.float32, "cpu"), factors([4] * n, N, torch.float32, "cpu", transposed=True)
    with torch.no_grad(), backend("torch"):
        As, Bs = laid_side_by_side(As, places), laid_side_by_side(Bs, places)
        ours = lora_routed(base, x, As, Bs, SCALES[:n], *routing(one_each(slots), n, "cpu"))
        wanted = by_row_add(base, x, As, Bs, SCALES[:n], one_each(slots))
    torch.testing.assert_close(ours, wanted)
    return ways


def test_equal_slots_of_more_rows_go_together(ways, monkeypatch):
    monkeypatch.setattr(routed_few, "FEW_ROWS", 8)
    assert many([5, 5], [0, 1], ways) == [("together", 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [1, -1])  # the rows of a slot follow one another, or are gathered
@pytest.mark.parametrize("same_scale", [True, False])
def test_a_piece_at_a_time(dtype, order, same_scale, ways, monkeypatch):
    monkeypatch.setattr(routed_few, "PIECE", 2 * 2 * N)
    slots = [slot for slot in range(5) for _ in range(2)][::order]
    base, x = torch.randn(10, N).to(dtype), torch.randn(10, K).to(dtype)
    As, Bs = factors([4] * 5, K, torch.float32, "cpu"), factors([4] * 5, N, torch.float32, "cpu", transposed=True)
    entries, scales = one_each(slots), [0.7] * 5 if same_scale else SCALES[:5]
    with torch.no_grad(), backend("torch"):
        As, Bs = laid_side_by_side(As, [0, 1, 2, 3, 4]), laid_side_by_side(Bs, [0, 1, 2, 3, 4])
        ours = lora_routed(base, x, As, Bs, scales, *routing(entries, 5, "cpu"))
        eager = by_row_add(base, x, As, Bs, scales, entries)
        wide = [[t.double() for t in factors] for factors in (As, Bs)]
        exact = by_row_add(base.double(), x.double(), *wide, scales, entries)
    assert ways == [("together", 2), ("together", 2), ("together", 1)]
    assert_as_close_as_torch("out", ours, eager, exact)


@pytest.mark.parametrize(
    ("counts", "places", "limits"),
    [
        ([4, 6], [0, 1], {}),  # unequal
        ([5, 5], [0, 2], {}),  # a gap
        ([5, 5], [0, 1], {"FEW_OF_A_SLOT": 4}),
    ],
)
def test_others_of_more_rows_are_left_to_the_general_way(counts, places, limits, ways, monkeypatch):
    monkeypatch.setattr(routed_few, "FEW_ROWS", 8)
    for name, value in limits.items():
        monkeypatch.setattr(routed_few, name, value)
    assert many(counts, places, ways) == []


def test_slots_with_the_same_factors(ways):
    """Two slots, one adapter: each row of both is computed, by its slot's scale."""
    base, x = torch.randn(4, N), torch.randn(4, K)
    A, B = laid_side_by_side([torch.randn(4, K)], [0])[0], laid_side_by_side([torch.randn(N, 4)], [0])[0]
    entries = one_each([0, 1, 0, 1])
    with torch.no_grad(), backend("torch"):
        ours = lora_routed(base, x, [A, A], [B, B], SCALES[:2], *routing(entries, 2, "cpu"))
        wanted = by_row_add(base, x, [A, A], [B, B], SCALES[:2], entries)
    torch.testing.assert_close(ours, wanted)
    assert ways == [("slot by slot", 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("columns", "step", "offset"), [(32, 1, 0), (32, 2, 0), (7, 1, 0), (32, 1, 1)])
def test_rows_are_put_with_all_their_bits(dtype, columns, step, offset):
    """Also those of a NaN, whatever the strides."""
    size = torch.empty(0, dtype=dtype).element_size()
    noise = torch.randint(0, 256, (9 * columns * step * size + size,), dtype=torch.uint8)
    out = noise.view(dtype)[offset : offset + 9 * columns * step].view(9, -1)[:, ::step]
    rows, index = torch.randn(3, columns).to(dtype), torch.tensor([7, 0, 3])
    rows[0, 0] = torch.nan
    wanted = out.clone()
    wanted[index] = rows
    put_rows_(out, index, rows)
    assert torch.equal(out.contiguous().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("inputs", "outputs"), [(0, N), (K, 0), (0, 0)])
@pytest.mark.parametrize("slots", [[0, 0], [1, 0], [0, 0, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_columns(inputs, outputs, slots, dtype):
    base, x, n = torch.randn(len(slots), outputs).to(dtype), torch.randn(len(slots), inputs).to(dtype), max(slots) + 1
    As, Bs = [torch.randn(4, inputs)] * n, [torch.randn(outputs, 4)] * n
    with torch.no_grad(), backend("torch"):
        ours = lora_routed(base, x, As, Bs, SCALES[:n], *routing(one_each(slots), n, "cpu"))
    assert torch.equal(ours, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_narrow_factors_and_rows_out_of_order(dtype, scale, ways):
    """One rounding, of the sum: what is large before it is scaled does not overflow; a base row keeps its very NaN."""
    slots = [1, 0, -1, 1, 0]
    base, x = torch.randn(len(slots), N).to(dtype), 40 * torch.randn(len(slots), K).to(dtype)
    base[2, 5] = torch.tensor([0x7FC1], dtype=torch.int16).view(torch.bfloat16).to(dtype)
    As, Bs = [100 * torch.randn(4, K) for _ in range(2)], [10 * torch.randn(N, 4) for _ in range(2)]
    As, Bs = [A.to(dtype) for A in As], [B.to(dtype) for B in Bs]
    with torch.no_grad(), backend("torch"):
        laid = laid_side_by_side(As, [0, 1]), laid_side_by_side(Bs, [0, 1])
        ours = lora_routed(base, x, *laid, [scale] * 2, *routing(one_each(slots), 2, "cpu"))
    assert ways == [("together", 2)]
    assert torch.equal(ours[2].view(torch.int16), base[2].view(torch.int16))
    rows = [0, 1, 3, 4]
    S = torch.stack([As[slots[row]].double() @ x[row].double() for row in rows]).to(dtype).double()
    delta = torch.stack([Bs[slots[row]].double() @ s for row, s in zip(rows, S, strict=True)])
    wanted = (base[rows].double() + scale * delta).to(dtype)
    torch.testing.assert_close(ours[rows], wanted)
