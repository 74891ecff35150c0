"""Which waiting requests may start, and which adapter is to become resident where. Plain bookkeeping, without threads.

Adapters wait in one line, in the order of their oldest waiting request. One that is resident admits all its requests.
One that is not claims a slot: an idle one if there is any, else a busy one, each time the least recently used. A
claimed slot admits nobody any more, so that it falls idle and the adapter that claims it can take it: however many
requests come for resident adapters, nobody waits for ever. Pinned adapters are never claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fastpeft.serving.handle import RequestHandle
from fastpeft.serving.registry import AdapterEntry, AdapterVersion


@dataclass(eq=False)
class Request:
    """What is to be generated, and where it stands.

    Attributes:
        entry: its adapter; None for the base model.
        slot: which it runs in, once admitted.
        is_started: the manager has it.
    """

    handle: RequestHandle
    input_ids: list[int]
    max_new_tokens: int
    eos_token_id: int | list[int] | None
    stream: bool
    entry: AdapterEntry | None
    slot: Slot | None = None
    is_started: bool = False


@dataclass(eq=False)
class Slot:
    """A place for an adapter in the model.

    Attributes:
        index: its number.
        entry, version: what is in it; None while it is empty.
        users: requests that run with it.
        last_used: number of the admission that used it last.
    """

    index: int
    entry: AdapterEntry | None = None
    version: AdapterVersion | None = None
    users: int = 0
    last_used: int = 0

    @property
    def is_pinned(self) -> bool:
        return self.entry is not None and self.entry.pinned and self.entry.current is self.version

    def vacate(self) -> None:
        self.entry = self.version = None


@dataclass
class Plan:
    """What can be done now.

    Attributes:
        admit: adapters whose requests may start, and the slot they are in.
        load: adapters whose weights are there, and the idle slot that each is to take.
        hopeless: adapters that can never become resident: every slot is pinned.
    """

    admit: list[tuple[AdapterEntry, Slot]] = field(default_factory=list)
    load: list[tuple[AdapterEntry, Slot]] = field(default_factory=list)
    hopeless: list[AdapterEntry] = field(default_factory=list)


def plan(line: Iterable[AdapterEntry], slots: list[Slot], is_ready: Callable[[AdapterVersion], bool]) -> Plan:
    """What can be done for the adapters in the line, the first one first.

    Args:
        line: adapters that wait, in order.
        slots: all of them.
        is_ready: whether the weights of a version are in memory.
    """
    result, used = Plan(), set[Slot]()
    resident = {slot.version: slot for slot in slots if slot.version is not None}
    claimable = [slot for slot in slots if not slot.is_pinned]
    all_pinned = not claimable
    claimed = set[Slot]()
    for entry in line:
        slot = resident.get(entry.current)
        if slot is not None and slot not in claimed:
            result.admit.append((entry, slot))
            used.add(slot)
        elif slot is None and all_pinned:
            result.hopeless.append(entry)
        elif slot is None and claimable:
            claim = min(claimable, key=lambda slot: _when_to_leave(slot, slot in used))
            claimable.remove(claim)
            claimed.add(claim)
            if claim.users == 0 and claim not in used and is_ready(entry.current):
                result.load.append((entry, claim))
    return result


def _when_to_leave(slot: Slot, is_used_now: bool) -> tuple[bool, bool, bool, int]:
    """Empty slots first, then idle ones, then those whose requests are not the newest."""
    return slot.users > 0 or is_used_now, slot.version is not None, is_used_now, slot.last_used
