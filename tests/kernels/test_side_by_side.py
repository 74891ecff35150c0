"""Tensors on one shelf are found, and no others: a wrong answer would read somebody else's memory."""

import gc
import io
import weakref

import pytest
import torch

from fastpeft_kernels import side_by_side as module
from fastpeft_kernels.side_by_side import Shelf, side_by_side

SHAPE = (4, 8)


def filled(places, dtype=torch.float32):
    shelf = Shelf(places, SHAPE, dtype)
    shelf.stack.copy_(torch.randn(shelf.stack.shape))
    return shelf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_order_with_gaps_and_in_any_order(dtype):
    shelf = filled(9, dtype)
    for places, first in (((0, 1, 2), 0), ((3, 4, 5, 6), 3), ((2, 7, 5), 2), ((8, 0), 0), ((4,), 4)):
        tensors = [shelf.tensor(place) for place in places]
        found = side_by_side(tensors)
        assert found.places == tuple(place - first for place in places)
        assert len(found.stack) == max(found.places) + 1
        assert found.stack.data_ptr() == shelf.stack[first].data_ptr()
        for tensor, place in zip(tensors, found.places, strict=True):
            assert tensor.dtype == dtype
            assert torch.equal(found.stack[place], tensor)


def test_others_are_not_taken_for_it():
    shelf, other = filled(6), filled(6)
    a, b = shelf.tensor(0), shelf.tensor(1)
    assert side_by_side([torch.randn(SHAPE), torch.randn(SHAPE)]) is None
    assert side_by_side([a, other.tensor(1)]) is None
    assert side_by_side([other.tensor(1), a]) is None
    assert side_by_side([a, b.clone()]) is None
    assert side_by_side([a, a]) is None  # the same: whoever lays rows by place has room for one of them
    assert side_by_side([a, shelf.tensor(0)]) is None
    assert side_by_side([a, b[:3]]) is None  # another rank
    assert side_by_side([a[:3], b[:3]]) is None
    assert side_by_side([a.t(), b.t()]) is None  # not contiguous
    assert side_by_side([a.view(8, 4), b.view(8, 4)]) is None  # another shape
    assert side_by_side([a.view(torch.int32), b.view(torch.int32)]) is None
    assert side_by_side([shelf.stack.view(-1)[16:48].view(SHAPE), b]) is None  # between two places
    assert side_by_side([torch.empty(0, 8), torch.empty(0, 8)]) is None


def test_a_tensor_of_a_shelf_looks_like_any_other():
    shelf = filled(5)
    a, b = shelf.tensor(1), shelf.tensor(2)
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert a.untyped_storage().nbytes() == a.nbytes
    assert a.storage_offset() == 0
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(a, file)
    torch.save(a.clone(), plain)
    assert len(file.getvalue()) == len(plain.getvalue())


def test_it_knows_who_holds_a_part_of_it():
    shelf = filled(3)
    assert shelf.storages() == 0
    a, b = shelf.tensor(0), shelf.tensor(2)
    view = b[1:]
    assert shelf.storages() == 2
    assert [shelf.place_of(t) for t in (a, b, view, torch.empty(SHAPE))] == [0, 2, None, None]
    del a, b
    assert shelf.storages() == 1  # the view
    del view
    assert shelf.storages() == 0


def test_the_memory_lives_as_long_as_a_tensor_and_is_forgotten_with_the_shelf():
    shelf = filled(3)
    start, value = shelf.start, shelf.stack[1].clone()
    a, b = shelf.tensor(1), shelf.tensor(2)
    memory = weakref.ref(shelf.stack)
    assert start in module._shelves
    del shelf
    gc.collect()
    assert memory() is not None
    assert start not in module._shelves
    assert start not in module._starts
    assert side_by_side([a, b]) is None
    assert torch.equal(a, value)
    del a, b
    gc.collect()
    assert memory() is None
