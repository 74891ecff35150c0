"""Count what an op moves, without a GPU: bytes by kernel argument, torch operators by operand, launches.

Kernels run in Triton's interpreter, with TRITON_INTERPRET=1 set before triton is imported. Every load and store is
counted by the pointer argument it came from: the distinct unmasked elements that one block access touches, which is
what reaches memory when the hardware joins the accesses of a block. Caches are not modelled: a second pass over a
tensor counts again, unless the argument is named as one that a cache holds for as long as a launch lasts. Operators of
torch count each operand once; products with a frozen weight are the base's own, apart from the C operand that they read
when they accumulate. A kernel that takes a frozen weight through a TMA descriptor is a base product too: what goes
through its descriptors is the base's own, what goes through its pointers is not.
"""

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TAG_SHIFT = 48  # user addresses have 47 bits: the bits above say which argument a pointer came from


@dataclass
class Launch:
    """One kernel or one operator of torch.

    Attributes:
        name: the kernel's, or the operator's: "aten.addmm_".
        reads, writes: bytes by argument of a kernel, or by position of an operator's tensor.
        is_base: a product with the frozen weight; a C operand that it reads is counted in `Traffic.c_reads`.
        own: of a base product, the bytes that the frozen layer moves as well; they are not in reads and writes.
    """

    name: str
    reads: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    is_base: bool = False
    own: Counter[str] = field(default_factory=Counter)

    @property
    def arguments(self) -> Counter[str]:
        return self.reads + self.writes

    @property
    def bytes(self) -> int:
        return self.arguments.total()


class Traffic:
    """What was counted, in order of execution."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.c_reads = 0  # bytes of C operands that base products read

    def beside_base(self) -> list[Launch]:
        return [launch for launch in self.launches if not launch.is_base]

    def bytes(self) -> int:
        """All bytes beyond the base products: kernels, other operators, and the C operands of the base products."""
        return sum(launch.bytes for launch in self.launches) + self.c_reads

    def arguments(self) -> Counter[str]:
        """Bytes by "name.argument", reads and writes together, without those that are the frozen layer's own."""
        total: Counter[str] = Counter()
        for launch in self.launches:
            for argument, count in launch.arguments.items():
                total[f"{launch.name}.{argument}"] += count
        return total

    def seconds(self, bytes_per_second: float) -> float:
        """Predicted time: what was counted over a bandwidth, for example 4.3e12 on an H200."""
        return self.bytes() / bytes_per_second


@contextmanager
def counting(*weights: Tensor, cached: Container[str] = ()) -> Iterator[Traffic]:
    """Count what runs in this block, on this thread and in backward passes that it starts on CPU tensors.

    Args:
        weights: frozen weights; products that read one of them are base products.
        cached: arguments of kernels that every program reads anew and a cache holds: what a launch reads of them counts
            once, element by element.
    """
    traffic = Traffic()
    frozen = frozenset(weight.untyped_storage().data_ptr() for weight in weights)
    with _Operators(traffic, frozen), _interpreter_hooks(traffic, frozen, cached):
        yield traffic


# Kernels.


@contextmanager
def _interpreter_hooks(traffic: Traffic, frozen: frozenset[int], cached: Container[str]) -> Iterator[None]:
    """Tag each pointer argument of a launch in its upper bits; count and strip the tags at loads and stores."""
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    originals = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw")
    }
    call, convert = executor.__call__, interpreter._implicit_cvt
    names: list[str] = []  # of the running launch, by tag - 1
    seen: dict[str, set[int]] = {}  # of the running launch: addresses read of cached arguments
    descriptors: set[str] = set()  # of the running launch

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        waiting = [name for name in bound if name not in self.constexprs]
        names.clear()
        seen.clear()
        _state.in_kernel, _state.waiting, _state.depth = True, waiting, 0
        described = {name: value.base for name, value in bound.items() if isinstance(value, TensorDescriptor)}
        descriptors.clear()
        descriptors.update(described)
        is_base = any(t.untyped_storage().data_ptr() in frozen for t in described.values())
        traffic.launches.append(Launch(self.fn.__name__, is_base=is_base))
        try:
            return call(self, *args, **kwargs)
        finally:
            _state.in_kernel = False

    def tag(arg: Any) -> Any:
        outermost = _state.depth == 0
        if outermost:
            _state.name = _state.waiting.pop(0)
        _state.depth += 1
        converted = convert(arg)
        _state.depth -= 1
        if hasattr(arg, "data_ptr"):
            names.append(_state.name)
            converted.handle.data = converted.handle.data | np.uint64(len(names) << TAG_SHIFT)
        return converted

    def count(pointers: Any, mask: Any, sides: tuple[str, ...]) -> Any:
        values = mask if isinstance(mask, np.ndarray) else mask.data  # a descriptor's comes bare
        inside = np.broadcast_to(values.astype(bool), pointers.data.shape)  # and some come as integers
        addresses = np.unique(pointers.data[inside])
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for number in np.unique(addresses >> TAG_SHIFT):
            name = names[int(number) - 1] if number else "address from memory"
            own = addresses[addresses >> TAG_SHIFT == number]
            if name in cached and sides == ("reads",):
                before = seen.setdefault(name, set())
                own = set(own.tolist()) - before
                before |= own
            running = traffic.launches[-1]
            for side in ("own",) if running.is_base and name in descriptors else sides:
                getattr(running, side)[name] += len(own) * size
        plain = pointers.data & np.uint64((1 << TAG_SHIFT) - 1)
        return interpreter.TensorHandle(plain, pointers.dtype, dict(pointers.attr))

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        return originals["create_masked_load"](self, count(ptrs, mask, ("reads",)), mask, *rest, **kwargs)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        plain = count(ptrs, mask, ("writes",))
        return originals["create_masked_store"](self, plain, value, mask, *rest, **kwargs)

    def atomic_cas(self: Any, ptr: Any, *rest: Any) -> Any:
        plain = count(ptr, np.ones_like(ptr.data, dtype=bool), ("reads", "writes"))
        return originals["create_atomic_cas"](self, plain, *rest)

    def atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        plain = count(ptr, mask, ("reads", "writes"))
        return originals["create_atomic_rmw"](self, op, plain, val, mask, *rest)

    patches = dict(zip(originals, (load, store, atomic_cas, atomic_rmw), strict=True))
    try:
        executor.__call__, interpreter._implicit_cvt = launch, tag
        for name, patch in patches.items():
            setattr(builder, name, patch)
        yield
    finally:
        executor.__call__, interpreter._implicit_cvt = call, convert
        for name, original in originals.items():
            setattr(builder, name, original)


class _State(threading.local):
    in_kernel = False
    waiting: list[str]
    depth = 0
    name = ""


_state = _State()


# Operators of torch.

_NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "_unsafe_view"}


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, traffic: Traffic, frozen: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic, self.frozen = traffic, frozen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not _state.in_kernel:
            self._count(func, args, kwargs or {}, outputs)
        return outputs

    def _count(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        schema = func._schema
        name = schema.name.split("::")[-1]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in inputs}
        written = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.numel()]
        mutates = schema.is_mutable
        new = [t for t in written if mutates or t.untyped_storage().data_ptr() not in storages]
        if name in _NO_LAUNCH or not new:
            return  # a view, or memory that nobody wrote
        launch = Launch(f"aten.{name}", is_base=bool(storages & self.frozen) and name in _PRODUCTS)
        overwrites = mutates and name in _OVERWRITING
        reads, writes = (launch.own, launch.own) if launch.is_base else (launch.reads, launch.writes)
        for i, t in enumerate(inputs):
            if not (overwrites and i == 0):
                reads[f"operand {i}"] += _distinct_bytes(t)
        for i, t in enumerate(new):
            writes[f"result {i}"] += _distinct_bytes(t)
        self.traffic.launches.append(launch)
        if launch.is_base and _PRODUCTS[name](args, kwargs):
            self.traffic.c_reads += _distinct_bytes(inputs[0])


def _accumulates(args: Any, kwargs: Any) -> bool:
    """addmm whose C operand is a matrix that it reads; a bias vector is the base layer's own."""
    return bool(kwargs.get("beta", 1) != 0 and args[0].ndim == 2)


# Products, and whether they read a C operand.
_PRODUCTS: dict[str, Callable[[Any, Any], bool]] = {
    "mm": lambda args, kwargs: False,
    "bmm": lambda args, kwargs: False,
    "addmm": _accumulates,
    "addmm_": _accumulates,
    "linear": lambda args, kwargs: False,
}
_OVERWRITING = {"copy_", "zero_", "fill_", "random_", "normal_", "uniform_", "bernoulli_"}


def _distinct_bytes(t: Tensor) -> int:
    """Bytes of the elements that differ in address: an expanded tensor is read once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * t.element_size()
