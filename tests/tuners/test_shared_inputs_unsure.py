"""Forwards that change a shared input where torch counts no changes: each must be computed layer by layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.tuners.shared_calls import calls_on_one_variable

pytestmark = pytest.mark.usefixtures("ops_for_few")
KEPT: list[Tensor] = []


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.act, self.same, self.dropout = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5)
        self.register_buffer("buffer", torch.ones(40, 16))

    def change(self, x: Tensor) -> None:
        x.add_(1)

    def change_what_was_kept(self) -> None:
        KEPT[-1].add_(1)


class AnotherName(Pair):
    def forward(self, x):
        y = x[:]
        a = self.a(y)
        x.add_(1)
        return a + self.b(y)


class Reshaped(Pair):
    def forward(self, x):
        y = torch.reshape(x, (-1, 16))
        a = self.a(x)
        y += 1
        return a + self.b(x)


class Out(Pair):
    def forward(self, x):
        y = x[:]
        a = self.a(x)
        torch.add(y, 1, out=y)
        return a + self.b(x)


class InPlaceModule(Pair):
    def forward(self, x):
        y = x[:]
        a = self.a(x)
        z = self.act(y)
        return a + self.b(x) + z


class MadeByIdentity(Pair):
    def forward(self, x):
        h = self.same(x)
        a = self.a(x)
        z = self.act(h)
        return a + self.b(x) + z


class MadeByDropout(Pair):
    def forward(self, x):
        h = self.dropout(x)
        a = self.a(x)
        h += 1
        return a + self.b(x)


class ByAMethod(Pair):
    def forward(self, x):
        y = x[:]
        a = self.a(x)
        self.change(y)
        return a + self.b(x)


class OutOfSight(Pair):
    def forward(self, x):
        KEPT.append(x)
        a = self.a(x)
        self.change_what_was_kept()
        return a + self.b(x)


class ByAProperty(Pair):
    @property
    def two(self) -> float:
        self.change_what_was_kept()
        return 2.0

    def forward(self, x):
        KEPT.append(x)
        a = self.a(x) * self.two
        return a + self.b(x)


class InOneExpression(Pair):
    def forward(self, x):
        return self.a(x) + x.add_(1).sum() + self.b(x)


class OtherPlaces(Pair):
    """The run that gives the group is not the one that is taken."""

    def forward(self, x, fast=False):
        if fast:
            return self.a(x) + self.b(x)
        a = self.a(x)
        x.add_(1)
        return a + self.b(x)


class Leftover(Pair):
    def forward(self, x):
        a = self.a(x)
        x.add_(1)
        return self.a(x) + self.b(x) + a


class InAnotherMethod(Pair):
    def together(self, x):
        return self.a(x) + self.b(x)

    def forward(self, x):
        a = self.a(x)
        x.add_(1)
        return a + self.b(x)


class OfASuperclass(Pair):
    def forward(self, x):
        a = self.a(x)
        x.add_(1)
        return a + self.b(x)


class OverriddenOnce(OfASuperclass):
    def forward(self, x, fast=False):
        return self.a(x) + self.b(x) if fast else super().forward(x)


class Retry(Pair):
    def check(self, times: int) -> None:
        if not times:
            raise ValueError

    def forward(self, x):
        for times in range(2):
            try:
                a = self.a(x)
                self.check(times)
                out = a + self.b(x)
            except ValueError:
                x.add_(1)
        return out


class Generator(Pair):
    def steps(self, x):
        a = self.a(x)
        yield a
        yield self.b(x)

    def forward(self, x):
        steps = self.steps(x)
        a = next(steps)
        x.add_(1)
        return a + next(steps)


class Hooked(Pair):
    """b's hook, of the user's, changes what c is called on."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x)


class Net(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pair(x)
        return out


PAIRS = [kind for kind in list(vars().values()) if isinstance(kind, type) and issubclass(kind, Pair)]
CASES = [kind for kind in PAIRS if kind is not Pair]
SAID_BY_THE_PARENT = (MadeByIdentity, Hooked)  # what is no linear layer, or hooked, is not in the source
NOT_TRACED = (OutOfSight, ByAProperty, Retry, Generator, Hooked, MadeByDropout)  # or otherwise than it runs


def adapted(kind: type[Pair]) -> Any:
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=4, target_modules=r".*\.[abc]", init_lora_weights=False)
    model = fastpeft.get_peft_model(Net(kind()), config).eval()
    if kind is Hooked:
        model.base_model.model.pair.b.register_forward_hook(change_input)
    return model


def change_input(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    args[0].add_(1)


@pytest.mark.parametrize(
    ("kind", "compiled"), [(kind, False) for kind in CASES] + [(kind, True) for kind in CASES if kind not in NOT_TRACED]
)
def test_a_changed_input(kind, compiled):
    torch._dynamo.reset()
    model = adapted(kind)
    x = torch.randn(40, 16)
    with torch.no_grad(), fastpeft.share_inputs(False):
        expected = model(x.clone())
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.no_grad() if compiled else torch.inference_mode():
        torch.testing.assert_close(forward(x.clone()), expected)


@pytest.mark.parametrize(
    "kind", [kind for kind in CASES if kind not in SAID_BY_THE_PARENT], ids=lambda kind: kind.__name__
)
def test_the_source_says_so(kind):
    assert not any(run.is_sure and set(run.names) >= {"a", "b"} for run in calls_on_one_variable(kind))
