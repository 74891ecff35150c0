"""IA3Config: every field of PEFT 0.21's, with its default and its checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from fastpeft.config import PeftConfig, PeftConfigMixin, as_module_names
from fastpeft.utils.peft_types import PeftType


@dataclass
class IA3Config(PeftConfig):
    """The config of an IA³ adapter (arXiv:2205.05638).

    Args:
        target_modules: modules to adapt: names (each matches itself and any path that ends in it), a regular expression
            for the whole path, "all-linear", or None for the defaults of the model family.
        exclude_modules: modules to leave out, as names or as a regular expression.
        feedforward_modules: those of the target modules whose *input* is scaled, the others' output being: names (each
            matches any path that ends in these letters), a regular expression for the whole path, or None for the
            defaults of the model family.
        fan_in_fan_out: the base layer stores its weight as (in, out), as transformers' Conv1D does.
        modules_to_save: modules to train in full and save with the adapter, such as a new classifier head.
        init_ia3_weights: True: all vectors are one, the adapter changes nothing at first. False: standard normal.

    Raises:
        ValueError: feedforward_modules names a module that target_modules does not, or an expression is none.
        TypeError: a value of the wrong kind.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    feedforward_modules: list[str] | set[str] | str | None = field(default=None)
    fan_in_fan_out: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)
    init_ia3_weights: bool = field(default=True)

    # How the vectors start is past once they are trained.
    _bookkeeping: ClassVar[frozenset[str]] = PeftConfigMixin._bookkeeping | {"init_ia3_weights"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        self.target_modules = as_module_names("target_modules", self.target_modules)
        self.exclude_modules = as_module_names("exclude_modules", self.exclude_modules)
        self.feedforward_modules = as_module_names("feedforward_modules", self.feedforward_modules)
        self.check()

    def check(self) -> None:
        """Raise for values that cannot work; again when the config is used, it may have changed.

        Works on a config of reference PEFT as well: `IA3Config.check(config)`.
        """
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(value := getattr(self, name), str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"{name}={value!r} is no regular expression: {error.msg}") from error
        targets, feedforward = self.target_modules, self.feedforward_modules
        if not isinstance(targets, set) or not isinstance(feedforward, set):
            return
        # "all-linear" becomes a set of whole paths: a name of feedforward_modules is then the end of one
        unknown = sorted(n for n in feedforward - targets if not any(t.endswith(f".{n}") for t in targets))
        if unknown:
            raise ValueError(
                f"feedforward_modules should be a subset of target_modules; {unknown} are not among {sorted(targets)}. "
                "Name them in both, or leave them out"
            )
