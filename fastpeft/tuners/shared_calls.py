"""Which submodules a module calls on one tensor, one after the other: read in its source.

Looked for are calls `self.a(x)` and `self.b(x)` with the same variable in one run of statements, where the first is not
called without the second and nothing in between may change x: by this name, by another one for the same memory, or out
of sight.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


@functools.cache
def calls_on_one_variable(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Names of submodules that a module's methods call on one variable, one after the other: a tuple a group.

    Empty for a class whose source cannot be read.
    """
    groups: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for klass in cls.__mro__:
        if klass.__module__.startswith("torch.nn.") or klass is object:
            continue
        for name, function in vars(klass).items():
            if name not in seen and inspect.isroutine(function):
                seen.add(name)
                groups += _groups_of_function(cls, function)
    return tuple(dict.fromkeys(groups))


def _groups_of_function(cls: type[nn.Module], function: Any) -> list[tuple[str, ...]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return []  # no source: typed into an interpreter, compiled, generated
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return []
    return list(_Reader(cls, definition).groups_of(definition.body))


_COMPOUND = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_FACTS = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "size", "dim", "numel", "stride"}
_RESHAPING = {"view", "reshape", "transpose", "permute", "flatten", "unflatten", "expand"}  # by sizes, not by tensors


class _Reader:
    """One method, read from its first statement to its last.

    Attributes:
        cls: the class of the module that runs it.
        this: its name for that module.
        outside: names of what others may know by other names: the module and the other arguments.
        bound: all names that are not global.
    """

    def __init__(self, cls: type[nn.Module], definition: ast.FunctionDef) -> None:
        self.cls, self.this = cls, definition.args.args[0].arg
        self.outside = {part.arg for part in ast.walk(definition.args) if isinstance(part, ast.arg)}
        self.bound = self.outside | _stored(definition)
        # As far as was read:
        self._linked: dict[str, set[str]] = {}  # names that may mean the same memory
        self._kept: set[str] = set()  # names that may mean memory of the module's

    def groups_of(self, block: list[ast.stmt]) -> Iterator[tuple[str, ...]]:
        """The groups of a run of statements: each statement that begins is followed by the next, or by an exception."""
        running: dict[str, list[str]] = {}  # variable -> submodules called on it since it last changed

        def close(variables: Iterable[str]) -> Iterator[tuple[str, ...]]:
            for variable in list(variables):
                names = tuple(dict.fromkeys(running.pop(variable, ())))
                if len(names) > 1:
                    yield names

        for statement in block:
            self._link(statement)
            if isinstance(statement, ast.For | ast.While):  # its first statements meet what its last ones did
                for part in ast.walk(statement):
                    if isinstance(part, ast.stmt):
                        self._link(part)
            if isinstance(statement, _COMPOUND):
                for inner in _inner_blocks(statement):
                    yield from self.groups_of(inner)
                leaves = any(isinstance(node, _LEAVING) for node in ast.walk(statement))
                yield from close(list(running) if leaves else self._touched(statement, running))
            elif not isinstance(statement, _DEFINITIONS):
                calls = list(_calls(statement, self.this))
                touched = self._touched(statement, [*running, *(variable for variable, _ in calls)])
                yield from close(touched)  # what it may do to them, or when, is not known
                for variable, submodule in calls:
                    if variable not in touched:
                        running.setdefault(variable, []).append(submodule)
            yield from close(_stored(statement))
        yield from close(running)

    def _link(self, statement: ast.stmt) -> None:
        """What a statement binds, hands on and keeps may from now on be one memory."""
        parts = [statement] if isinstance(statement, (*_DEFINITIONS, ast.Match)) else _own_parts(statement)
        names = {name for part in parts for name in _stored(part) | self._handed_on(part)} & self.bound
        together = self._known_as(names - {self.this})
        self._linked.update(dict.fromkeys(together, together))
        if self.this in names:
            self._kept |= names

    def _known_as(self, names: set[str]) -> set[str]:
        return names.union(*(self._linked.get(name, ()) for name in names))

    def _touched(self, statement: ast.stmt, variables: Iterable[str]) -> set[str]:
        """Those of the variables whose memory a statement may change."""
        changed = {name for target in _changed_in_place(statement) for name in self._handed_on(target)}
        if changed - self.bound or self._known_as(changed) & (self.outside | self._kept):
            return set(variables)  # others may have handed in the same memory by another name
        touched = changed | self._handed_on(statement, reading_this=False)
        return self._known_as(touched | self._kept if self.this in touched else touched).intersection(variables)

    def _handed_on(self, node: ast.AST, reading_this: bool = True) -> set[str]:
        """The variables that `node` uses otherwise than as the one argument of a submodule of this module, to ask for a
        fact, or as a size: it may give them another name, keep them, or have them changed in place, out of sight.

        The module itself is one of them where `node` hands it on or calls a method of its class; and, with
        `reading_this`, where it reads an attribute.
        """
        harmless: set[int] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and part.attr in _FACTS:
                harmless.add(id(part.value))
            elif isinstance(part, ast.Call) and _is_submodule_call(part, self.this):
                harmless.add(id(part.args[0]))
            elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr in _RESHAPING:
                harmless.update(id(size) for size in part.args)
            if isinstance(part, ast.Call) and (method := self._attribute(part.func)) and not hasattr(self.cls, method):
                harmless.add(id(part.func.value))  # type: ignore[attr-defined]
            elif not reading_this and (name := self._attribute(part)) and not hasattr(self.cls, name):
                harmless.add(id(part.value))  # type: ignore[attr-defined]
        names = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load))
        return {name.id for name in names if id(name) not in harmless}

    def _attribute(self, node: ast.AST) -> str | None:
        """name, of self.name"""
        of_this = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.this
        return node.attr if of_this else None  # type: ignore[attr-defined]


def _own_parts(statement: ast.stmt) -> list[ast.AST]:
    """A statement without the statements in it."""
    inner = (ast.stmt, ast.excepthandler, ast.match_case)
    return [part for part in ast.iter_child_nodes(statement) if not isinstance(part, inner)]


def _inner_blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        if block := getattr(statement, field, None):
            yield block
    for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        yield part.body


def _calls(node: ast.AST, this: str) -> Iterator[tuple[str, str]]:
    """(variable, submodule) for each call `self.submodule(variable)` that is sure to be made when `node` is run."""
    if isinstance(node, ast.Call) and _is_submodule_call(node, this):
        yield node.args[0].id, node.func.attr  # type: ignore[attr-defined]
    for child in _surely_run(node):
        yield from _calls(child, this)


def _surely_run(node: ast.AST) -> Iterable[ast.AST]:
    if isinstance(node, ast.IfExp):
        return [node.test]
    if isinstance(node, ast.BoolOp):
        return node.values[:1]
    if isinstance(node, _COMPREHENSIONS + _DEFINITIONS):
        return []
    return ast.iter_child_nodes(node)


def _is_submodule_call(node: ast.Call, this: str) -> bool:
    """self.submodule(variable)"""
    function = node.func
    of_this = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == this
    return of_this and len(node.args) == 1 and isinstance(node.args[0], ast.Name) and not node.keywords


def _stored(node: ast.AST) -> set[str]:
    """The variables that running `node` binds anew."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)}
    defined = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef | ast.MatchAs | ast.MatchStar)}
    return names | {name for name in defined if name}


def _changed_in_place(node: ast.AST) -> Iterator[ast.AST]:
    """What is said to be changed in place: x of x[0] = ..., x += ..., x.add_(...), f(out=x), f(x, inplace=True)."""
    for part in ast.walk(node):
        if isinstance(part, ast.Subscript) and not isinstance(part.ctx, ast.Load):
            yield part.value
        elif isinstance(part, ast.AugAssign):
            yield _read(part.target)
        elif isinstance(part, ast.Call):
            if isinstance(part.func, ast.Attribute) and part.func.attr.endswith("_"):
                yield part.func.value
            yield from (keyword.value for keyword in part.keywords if keyword.arg == "out")
            if any(keyword.arg == "inplace" for keyword in part.keywords):
                yield from part.args


def _read(target: ast.expr) -> ast.expr:
    """What an augmented assignment binds, as an expression that reads it."""
    return ast.Name(target.id, ast.Load()) if isinstance(target, ast.Name) else target
