"""Tensors that lie side by side are found, and no others: a wrong answer would read somebody else's memory."""

import torch

from fastpeft_kernels.side_by_side import side_by_side


def lying_in(stack, *places):
    """A Parameter for each place: a part of the stack's storage."""
    parameters = [torch.nn.Parameter(torch.empty(0)) for _ in places]
    for parameter, place in zip(parameters, places, strict=True):
        parameter.data = stack[place]
    return parameters


@torch.no_grad()
def test_in_order_with_gaps_and_in_any_order():
    stack = torch.randn(9, 4, 5)
    for places, first in (((0, 1, 2), 0), ((3, 4, 5, 6), 3), ((2, 7, 5), 2), ((8, 0), 0), ((4,), 4)):
        tensors = lying_in(stack, *places)
        found = side_by_side(tensors)
        assert found.places == tuple(place - first for place in places)
        assert len(found.stack) == max(found.places) + 1
        assert found.stack.data_ptr() == stack[first].data_ptr()
        for tensor, place in zip(tensors, found.places, strict=True):
            assert torch.equal(found.stack[place], tensor)


@torch.no_grad()
def test_others_are_not_taken_for_it():
    stack = torch.randn(6, 4, 5)
    flat = stack.view(-1)
    assert side_by_side([torch.randn(4, 5), torch.randn(4, 5)]) is None
    assert side_by_side([stack[0], stack[1].clone()]) is None
    assert side_by_side([stack[1].clone(), stack[0]]) is None
    assert side_by_side([stack[0], stack[1, :3]]) is None  # another rank
    assert side_by_side([stack[0].t(), stack[1].t()]) is None  # not contiguous
    assert side_by_side([flat[:20].view(4, 5), flat[30:50].view(4, 5)]) is None  # no multiple of their size apart
    assert side_by_side([stack[0, :0], stack[1, :0]]) is None  # of rank 0


@torch.no_grad()
def test_neighbours_in_memory_of_two_storages_are_two():
    """What is next to a storage is not its own, even where it happens to be a tensor of the right size."""
    memory = bytearray(2 * 80)
    both = [torch.frombuffer(memory, dtype=torch.float32, count=20, offset=start).view(4, 5) for start in (0, 80)]
    assert both[1].data_ptr() == both[0].data_ptr() + both[0].nbytes
    assert both[0].untyped_storage().data_ptr() != both[1].untyped_storage().data_ptr()
    assert side_by_side(both) is None
    assert side_by_side(both[::-1]) is None
