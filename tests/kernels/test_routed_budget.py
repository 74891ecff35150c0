"""What a batch of many adapters may launch and move, counted in the interpreter.

Launches do not depend on the number of slots. Each tile of a slot's rows (16 in a small batch) reads the factors of its
own slot once, at their own rank: in decoding, each distinct adapter once.
"""

from collections import Counter

import pytest
import torch
from routed_operands import one_each, routing

from fastpeft.benchmark.budget import count_routed
from fastpeft_kernels.dispatch import interpreting
from fastpeft_kernels.gpu import routed as gpu

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")

M, K, N, TILE = 32, 64, 256, 16
SLOTS = (1, 4, 16)
FORWARD = ["_routed_shrink_kernel", "_routed_expand_kernel"]
BACKWARD = [
    *("_routed_shrink_kernel", "_routed_outer_kernel", "_routed_sum_kernel"),  # dS, dB
    *("_routed_outer_kernel", "_routed_sum_kernel", "_routed_expand_kernel"),  # dA, dx
]


def ranks_of(slots):
    return [(3, 16, 8, 1)[slot % 4] for slot in range(slots)]


def in_turn(slots, rows=M):
    return [m % slots for m in range(rows)]


def tiles_of(taken, slot):
    return -(-taken.count(slot) // TILE)


def factor_elements(taken, ranks, columns):
    """Of what each tile reads: the slot's own factor."""
    return sum(tiles_of(taken, slot) * r * columns for slot, r in enumerate(ranks))


def count(slots, taken, **kwargs):
    return count_routed(K, N, ranks_of(slots), *routing(one_each(taken), slots, "cpu"), **kwargs)


def names(traffic):
    return [launch.name for launch in traffic.launches]


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_inference_takes_two_launches_and_reads_each_adapter_once(slots, adapters):
    taken = in_turn(slots)
    forward, _ = count(slots, taken, adapters=adapters, train=False)
    assert names(forward) == FORWARD
    size, moved = adapters.itemsize, forward.arguments()
    in_factors = {launch.name: launch.reads["address from memory"] for launch in forward.launches}
    assert in_factors == {
        FORWARD[0]: size * factor_elements(taken, ranks_of(slots), K),
        FORWARD[1]: size * factor_elements(taken, ranks_of(slots), N),
    }
    if slots > 1:  # 16 rows or fewer have a slot: no adapter is read twice
        assert sum(in_factors.values()) == size * sum(ranks_of(slots)) * (K + N)
    assert moved[f"{FORWARD[0]}.x_ptr"] == 2 * M * K  # ranks up to 16: one block
    assert moved[f"{FORWARD[1]}.base_ptr"] == moved[f"{FORWARD[1]}.out_ptr"] == 2 * M * N


@pytest.mark.parametrize("slots", SLOTS)
def test_training_takes_as_many_launches_whatever_the_slots(slots):
    taken = in_turn(slots)
    forward, backward = count(slots, taken)
    assert names(forward) == FORWARD
    assert names(backward) == BACKWARD
    moved = backward.arguments()
    assert moved["_routed_shrink_kernel.x_ptr"] == 2 * M * N  # dout for dS
    assert moved["_routed_outer_kernel.x_ptr"] == 2 * M * N + 2 * M * K  # dout for dB, x for dA
    assert moved["_routed_expand_kernel.out_ptr"] == 2 * M * K  # dx
    grads = 4 * sum(ranks_of(slots)) * (K + N)
    assert moved["_routed_sum_kernel.out_ptr"] == grads
    planes = moved["_routed_outer_kernel.plane_ptr"] + moved["_routed_sum_kernel.plane_ptr"]
    assert planes == 2 * grads  # one band of rows: written and read once


def test_rows_of_nobody_cost_their_copy_alone():
    taken = [0 if m % 8 == 0 else -1 for m in range(M)]
    forward, _ = count(4, taken, train=False)
    moved = forward.arguments()
    assert moved["_routed_shrink_kernel.x_ptr"] == 2 * K * taken.count(0)
    nobody, _ = count(4, [-1] * M, train=False)
    moved = nobody.arguments()
    assert not moved["_routed_shrink_kernel.x_ptr"]
    assert not any(launch.reads["address from memory"] for launch in nobody.launches)
    assert moved["_routed_expand_kernel.base_ptr"] == moved["_routed_expand_kernel.out_ptr"] == 2 * M * N


def test_few_rows_split_k_at_no_launch_more():
    tensors = routing(one_each([0, 1, -1]), 2, "cpu")
    forward, _ = count_routed(600, 40, (4, 16), *tensors, train=False)
    assert names(forward) == FORWARD
    splits = 3
    assert forward.arguments()["_routed_shrink_kernel.s_ptr"] == splits * 3 * 16 * 4
    training, _ = count_routed(600, 40, (4, 16), *tensors)
    assert names(training) == [FORWARD[0], "_sum_planes_kernel", FORWARD[1]]


def test_a_weighted_batch_takes_an_expand_for_each_pass():
    entries = [[(0, 0.5), (1, 0.5)], [(1, 1.0)], [], [(0, 0.3)]]
    forward, backward = count_routed(K, N, (3, 16), *routing(entries, 2, "cpu"))
    assert Counter(names(forward)) == {FORWARD[0]: 1, FORWARD[1]: 2}
    assert Counter(names(backward)) == Counter([*BACKWARD, FORWARD[1]])


def test_a_launch_for_each_slot_would_be_counted(monkeypatch):
    """The tests above are able to fail: shrink slot by slot."""
    original = gpu.routed_shrink_planes

    def one_by_one(x, bank, *rest):
        return torch.stack([original(x, bank, *rest) for _ in range(bank.slots)])[0]

    monkeypatch.setattr(gpu, "routed_shrink_planes", one_by_one)
    forward, _ = count(4, in_turn(4), train=False)
    assert len(names(forward)) > len(FORWARD)
    assert forward.arguments()["_routed_shrink_kernel.x_ptr"] > 2 * M * K
