"""Who may start and who becomes resident where: bookkeeping without threads."""

import random

import pytest

from fastpeft.serving.admission import Slot, plan
from fastpeft.serving.registry import AdapterEntry, AdapterVersion


def entries(names):
    return {name: AdapterEntry(name, AdapterVersion(name, i)) for i, name in enumerate(names, 1)}


def slots_with(adapters, contents, users=None):
    """Slots with these adapters ("-" for none), the least recently used first."""
    slots = []
    for index, name in enumerate(contents):
        entry = adapters.get(name)
        slots.append(Slot(index, entry, entry and entry.current, (users or [0] * 9)[index], index))
    return slots


def planned(line, slots, ready=lambda version: True):
    result = plan(line, slots, ready)
    named = [[(entry.name, slot.index) for entry, slot in pairs] for pairs in (result.admit, result.load)]
    return *named, [entry.name for entry in result.hopeless]


@pytest.mark.parametrize(
    ("line", "contents", "users", "admit", "load"),
    [
        ("ab", "ab", [1, 1], [("a", 0), ("b", 1)], []),
        ("c", "a-", [0, 0], [], [("c", 1)]),  # an empty slot before an idle one
        ("c", "ab", [0, 0], [], [("c", 0)]),  # the least recently used
        ("c", "ab", [1, 0], [], [("c", 1)]),  # an idle one before a busy one
        ("c", "ab", [1, 1], [], []),  # nothing is idle
        ("ca", "ab", [1, 1], [], []),  # c claims a's slot: a admits nobody
        ("cb", "ab", [1, 1], [("b", 1)], []),
        ("ac", "ab", [1, 1], [("a", 0)], []),  # a is first: c claims the other slot
        ("cda", "ab", [0, 0], [], [("c", 0), ("d", 1)]),
        ("ac", "ab", [0, 0], [("a", 0)], [("c", 1)]),  # a's slot is used from now on
        ("acd", "ab", [0, 0], [("a", 0)], [("c", 1)]),
    ],
    ids=str,
)
def test_plan(line, contents, users, admit, load):
    adapters = entries("abcd")
    assert planned([adapters[n] for n in line], slots_with(adapters, contents, users)) == (admit, load, [])


def test_weights_that_are_not_there_yet_keep_their_slot():
    adapters = entries("abcd")
    slots = slots_with(adapters, "ab", [0, 0])
    ready = {adapters["d"].current}.__contains__
    assert planned([adapters["c"], adapters["d"]], slots, ready) == ([], [("d", 1)], [])


def test_pinned_adapters_stay():
    adapters = entries("abc")
    slots = slots_with(adapters, "ab", [0, 0])
    adapters["a"].pinned = True
    assert planned([adapters["c"]], slots) == ([], [("c", 1)], [])
    adapters["b"].pinned = True
    assert planned([adapters["b"], adapters["c"]], slots) == ([("b", 1)], [], ["c"])


def test_an_old_version_is_not_pinned():
    adapters = entries("abc")
    slots = slots_with(adapters, "a", [0])
    adapters["a"].pinned = True
    adapters["a"].current = AdapterVersion("a", 9)
    assert planned([adapters["a"]], slots) == ([], [("a", 0)], [])


@pytest.mark.parametrize("seed", range(5))
def test_nobody_waits_for_ever(seed):
    """Whatever comes and however long requests take, an adapter gets its slot once those before it have ended."""
    rng = random.Random(seed)
    adapters = entries("abcdefgh")
    slots = slots_with(adapters, "---")
    line, waiting_since, ends, clock = {}, {}, [], 0
    for step in range(3000):
        if rng.random() < 0.7:  # two adapters are asked for all the time
            name = rng.choice("ab" if rng.random() < 0.8 else "cdefgh")
            line.setdefault(adapters[name])
            waiting_since.setdefault(name, step)
        result = plan(line, slots, lambda version: True)
        for entry, slot in result.load:
            slot.entry, slot.version = entry, entry.current
        for entry, slot in result.admit:
            clock += 1
            slot.users, slot.last_used = slot.users + 1, clock
            ends.append((step + rng.randrange(1, 10), slot))
            del line[entry], waiting_since[entry.name]
        for end, slot in [pair for pair in ends if pair[0] <= step]:
            ends.remove((end, slot))
            slot.users -= 1
        assert all(step - since < 120 for since in waiting_since.values()), waiting_since
