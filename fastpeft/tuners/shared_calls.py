"""Which submodules a module calls on one tensor, one after the other: read in the source of its class.

Looked for are calls `self.a(x)` and `self.b(x)` with the same variable in one run of statements, where the first is not
called without the second. That is a hint: x may be changed in between by another name, out of sight, and the modules
called elsewhere. A run is sure where the source leaves no room for that: nothing but such calls, and what is made of
their outputs, stands from its first call to its last, and its submodules are called nowhere else.
"""

import ast
import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn


class Run(NamedTuple):
    """Submodules that are called on one variable."""

    names: tuple[str, ...]
    is_sure: bool


@functools.cache
def calls_on_one_variable(cls: type[nn.Module]) -> tuple[Run, ...]:
    """The runs in a module's methods, sure ones also where they are part of one that is not.

    Empty for a class whose source cannot be read.
    """
    try:
        return tuple(_runs_of_class(cls))
    except Exception:  # nested too deeply, or descriptors of somebody's own: no run is worth an error
        return ()


def _runs_of_class(cls: type[nn.Module]) -> Iterator[Run]:
    hints: list[tuple[str, ...]] = []
    sure: Counter[tuple[str, ...]] = Counter()
    uses: Counter[str] = Counter()
    seen: set[str] = set()
    is_read = True
    for klass in cls.__mro__:
        if klass.__module__.startswith("torch.nn.") or klass is object:
            continue
        for name, member in vars(klass).items():
            function = getattr(member, "fget", member)
            if not inspect.isroutine(function) or name.startswith("__annotate"):  # which newer Pythons generate
                continue
            definition = _definition(function)
            if definition is None:
                is_read = False
                continue
            if name not in seen:
                seen.add(name)
                hints += _groups_of_block(definition.body, definition.args.args[0].arg)
            sure.update(_Window(cls, definition).runs_of(definition.body))  # overridden ones too: super() calls them
            uses += _uses(definition)
    for names, times in sure.items():
        if is_read and all(uses[name] == times for name in names):
            yield Run(names, True)
    for names in dict.fromkeys(hints):
        yield Run(names, False)


def _definition(function: Any) -> ast.FunctionDef | None:
    """What the source of a method says, where there is one and it has a first argument."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
        tree = ast.parse("if True:\n" + source if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None  # typed into an interpreter, compiled, generated
    first = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    return first if isinstance(first, ast.FunctionDef) and first.args.args else None


_COMPOUND = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)


def _groups_of_block(block: list[ast.stmt], this: str) -> Iterator[tuple[str, ...]]:
    """The groups of a run of statements: each statement that begins is followed by the next, or by an exception."""
    running: dict[str, list[str]] = {}  # variable -> submodules called on it since it last changed

    def close(variables: Iterable[str]) -> Iterator[tuple[str, ...]]:
        for variable in list(variables):
            names = tuple(dict.fromkeys(running.pop(variable, ())))
            if len(names) > 1:
                yield names

    for statement in block:
        if isinstance(statement, _COMPOUND):
            for inner in _inner_blocks(statement):
                yield from _groups_of_block(inner, this)
            leaves = any(isinstance(node, _LEAVING) for node in ast.walk(statement))
            yield from close(list(running) if leaves else _changed(statement) | _handed_on(statement, this))
        elif not isinstance(statement, _DEFINITIONS):
            calls = list(_calls(statement, this))
            used = _handed_on(statement, this)
            yield from close(used)  # what they may do to a variable, or when, is not known
            for variable, submodule in calls:
                if variable not in used:
                    running.setdefault(variable, []).append(submodule)
            yield from close(_changed(statement))
    yield from close(running)


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


_FACTS = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "size", "dim", "numel", "stride"}


def _handed_on(node: ast.AST, this: str) -> set[str]:
    """The variables that a statement uses otherwise than as the one argument of a submodule of this module, or to ask
    for a fact: it may give them another name, or have them changed in place, out of sight."""
    harmless: set[int] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr in _FACTS:
            harmless.add(id(part.value))
        elif isinstance(part, ast.Call) and _is_submodule_call(part, this):
            harmless.add(id(part.args[0]))
    names = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load))
    return {name.id for name in names if id(name) not in harmless}


def _is_submodule_call(node: ast.Call, this: str) -> bool:
    """self.submodule(variable)"""
    one = len(node.args) == 1 and isinstance(node.args[0], ast.Name) and not node.keywords
    return one and _attribute(node.func, this) is not None


def _attribute(node: ast.AST, this: str) -> str | None:
    """name, of self.name"""
    of_this = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == this
    return node.attr if of_this else None  # type: ignore[attr-defined]


def _changed(node: ast.AST) -> set[str]:
    """The variables that running `node` binds anew or changes in place: x = ..., x[0] = ..., x.add_(...)."""
    changed = _stored(node)
    for part in ast.walk(node):
        if isinstance(part, ast.Subscript | ast.Attribute) and isinstance(part.value, ast.Name):
            in_place = isinstance(part, ast.Attribute) and part.attr.endswith("_")
            if in_place or isinstance(part.ctx, ast.Store | ast.Del):
                changed.add(part.value.id)
    return changed


# Sure runs.

_RESHAPING = {"view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze", "contiguous", "to"}
_TORCH = {"F", "nn", "torch"}


class _Window:
    """From one statement on: calls of submodules on one variable, as long as nothing else stands there.

    What is made of their outputs is new memory. Nothing else is handed to anybody, so nobody can change the variable.
    """

    def __init__(self, cls: type[nn.Module], definition: ast.FunctionDef) -> None:
        self.cls, self.this = cls, definition.args.args[0].arg
        self.bound = {part.arg for part in ast.walk(definition) if isinstance(part, ast.arg)} | _stored(definition)

    def runs_of(self, block: list[ast.stmt]) -> Iterator[tuple[str, ...]]:
        """Every run there is, but for the later parts of one."""
        end = 0
        for start, statement in enumerate(block):
            for inner in _inner_blocks(statement):
                yield from self.runs_of(inner)
            if start < end and self._variables(statement) <= {self.variable}:
                continue
            names, length = self._names_from(block[start:])
            end = start + length
            if len(set(names)) > 1:
                yield names

    def _variables(self, statement: ast.stmt) -> set[str | None]:
        """What submodules are called on."""
        calls = (
            part for part in ast.walk(statement) if isinstance(part, ast.Call) and _attribute(part.func, self.this)
        )
        return {value.id for call in calls for value in call.args if isinstance(value, ast.Name)}

    def _names_from(self, block: list[ast.stmt]) -> tuple[tuple[str, ...], int]:
        """The submodules of the run that the first statement begins, and of how many statements it is."""
        names: list[str] = []
        self.variable: str | None = None
        self.made: set[str] = set()
        length = 0
        for statement in block:
            targets = _plain_targets(statement)
            if targets is None or not self._is_made(statement.value):  # type: ignore[attr-defined]
                break
            called = [self._submodule(part) for part in _in_order(statement)]
            names += [name for name in called if name is not None]
            if not names or self.variable in targets:
                break
            self.made |= targets
            length += 1
        return tuple(names), length

    def _is_made(self, node: ast.AST | None) -> bool:
        """Whether this is made of outputs alone: of the submodules on the variable, which the first of them sets."""
        if isinstance(node, ast.Name):
            return node.id in self.made
        if isinstance(node, ast.Call):
            if self._submodule(node) is not None:
                return True
            if isinstance(node.func, ast.Attribute) and node.func.attr in _RESHAPING:
                return self._is_made(node.func.value) and all(map(_is_size, node.args))
            made = [self._is_made(value) for value in node.args if not isinstance(value, ast.Constant)]
            return any(made) and all(made) and not node.keywords and self._is_module_or_function(node.func)
        if isinstance(node, ast.BinOp):
            return all(self._is_made(side) or self._is_number(side) for side in (node.left, node.right))
        if isinstance(node, ast.Tuple):
            return all(map(self._is_made, node.elts))
        if isinstance(node, ast.Subscript):
            return self._is_made(node.value) and _is_size(node.slice)
        return False

    def _is_number(self, node: ast.AST) -> bool:
        """A constant, or what the module holds, to be multiplied by."""
        name = _attribute(node, self.this)
        return isinstance(node, ast.Constant) or (name is not None and not hasattr(self.cls, name))

    def _submodule(self, node: ast.AST) -> str | None:
        """name, of a call self.name(variable) on the variable of this window."""
        if not isinstance(node, ast.Call) or not _is_submodule_call(node, self.this):
            return None
        variable, name = node.args[0].id, node.func.attr  # type: ignore[attr-defined]
        if hasattr(self.cls, name) or variable in self.made:
            return None
        self.variable = self.variable or variable
        return name if variable == self.variable else None

    def _is_module_or_function(self, node: ast.AST) -> bool:
        """self.name that is no method of the class, or a function of torch's that changes nothing in place."""
        name = _attribute(node, self.this)
        if name is not None:
            return not hasattr(self.cls, name)
        if not isinstance(node, ast.Attribute) or node.attr.endswith("_"):
            return False
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in _TORCH - self.bound


def _plain_targets(statement: ast.stmt) -> set[str] | None:
    """The variables that a statement binds, where all it does is to work out a value; None for any other one."""
    if not isinstance(statement, ast.Assign | ast.Return | ast.Expr):
        return None
    targets = [part for target in getattr(statement, "targets", ()) for part in getattr(target, "elts", (target,))]
    return {part.id for part in targets} if all(isinstance(part, ast.Name) for part in targets) else None


def _is_size(node: ast.AST) -> bool:
    """Whether nobody is called to work it out, but to ask for a fact."""
    called = [getattr(part, "func", None) for part in ast.walk(node) if isinstance(part, ast.Call | ast.NamedExpr)]
    return all(isinstance(function, ast.Attribute) and function.attr in _FACTS for function in called)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of an expression, arguments before the call that takes them."""
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)
    yield node


def _stored(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)}


def _uses(definition: ast.FunctionDef) -> Counter[str]:
    """How often each attribute of the module is read for itself, not for something of its own."""
    this = definition.args.args[0].arg
    read = [part for part in ast.walk(definition) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load)]
    inner = {id(part.value) for part in read}
    return Counter(part.attr for part in read if id(part) not in inner and _attribute(part, this))
