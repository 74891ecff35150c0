"""Layers that their parent calls on one tensor: found in its source."""

import pytest
import torch
from torch import nn

from fastpeft.tuners.shared_calls import calls_on_one_variable


class Straight(nn.Module):
    def forward(self, x, y):
        a = self.a(x).relu()
        b = self.act(self.b(x)) * self.c(y)
        return a + b + self.d(y)


class Branches(nn.Module):
    def forward(self, x, y=None):
        q = self.q(x)
        if y is None:
            y = x
            k, v = self.k(y), self.v(y)
        else:
            k = self.k2(y)
            v = self.v2(y)
        for _ in range(2):
            q = q + self.a(x) + self.b(x)
        with torch.no_grad():
            self.c(x)
        return q, k, v, self.w(x)


class Unsure(nn.Module):
    """What may run without the other, or on something else, is no group."""

    def forward(self, x, y):
        a = self.a(x)
        x = x + 1
        b = self.b(x)
        x.add_(1)
        c = self.c(x)
        x[0] = 0
        d = self.d(x)
        x += 1
        e = self.e(x)
        if y is None:
            return e
        f = self.f(x) if y else self.g(x)
        h = y and self.h(x)
        i = [self.i(x) for _ in y]
        j = lambda: self.j(x)  # noqa: E731
        f = self.f1(x)
        torch.relu_(x)
        f = self.f2(x)
        z = x
        f = self.f3(x) + self.f4(x.shape[0])
        z += 1
        f = self.f5(x) * x
        return a, b, c, d, f, h, i, j, self.k(x, y), self.m(x=x), self.n(x[0]), self.o(*x), self.p(x)


class OtherNames(nn.Module):
    """What may change x by another name, or out of sight, comes between: no group."""

    def forward(self, h, x):
        a = self.a(x)
        h.add_(1)  # the caller's two names may be one memory
        a = self.b(x)
        y = h[:]
        a = self.c(y)
        torch.add(h, 1, out=h)
        a = self.d(y)
        views = [y]
        a = self.e(y)
        for view in views:
            view += 1
        a = self.f(y)
        self.kept = y
        z = self.kept.view(-1)
        a = self.g(z)
        self.bump()
        a = self.h(z)
        self.kept[0] = 1
        a = self.i(z)
        later = lambda: y.relu_()  # noqa: E731
        a = self.j(y)
        later()
        a = self.k(y)
        GLOBAL.mul_(2)
        a = self.l(y)
        torch.nn.functional.relu(h, inplace=True)
        return a + self.m(y)

    def bump(self):
        self.kept.add_(1)


class OfNoConcern(nn.Module):
    """Changes of what the calls themselves gave, shapes and facts part nothing."""

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.size)
        q = self.q(x).view(shape)
        q *= 2
        k = self.k(x).reshape(*shape).relu_()
        k[0] = 0
        count = x.size(0)
        count += 1
        return self.norm(q), k, self.v(x)


GLOBAL = torch.zeros(1)


class Child(Straight):
    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return self.m(x), self.n(x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Straight, {("a", "b"), ("c", "d")}),
        (Branches, {("k", "v"), ("k2", "v2"), ("a", "b")}),
        (Unsure, set()),
        (OtherNames, set()),
        (OfNoConcern, {("q", "k", "v")}),
        (Child, {("m", "n")}),
        (nn.Linear, set()),
        (nn.TransformerEncoderLayer, set()),
        (type("Generated", (nn.Module,), {"forward": eval("lambda self, x: (self.a(x), self.b(x))")}), set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_groups_in_the_source(kind, expected):
    assert set(calls_on_one_variable(kind)) == expected


def test_groups_of_transformers_models():
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense

    found = {kind.__name__: calls_on_one_variable(kind) for kind in (LlamaAttention, LlamaMLP, BertSelfAttention)}
    assert found == {
        "LlamaAttention": (("q_proj", "k_proj", "v_proj"),),
        "LlamaMLP": (("gate_proj", "up_proj"),),
        "BertSelfAttention": (("query", "key", "value"),),
    }
    assert calls_on_one_variable(T5Attention) == (("k", "v"),)  # in cross-attention q sees another tensor
    assert calls_on_one_variable(T5DenseGatedActDense) == (("wi_0", "wi_1"),)
