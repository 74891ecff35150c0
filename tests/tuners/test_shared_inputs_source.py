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


class OfNoConcern(nn.Module):
    """What is made of the outputs, sizes and numbers part nothing."""

    def forward(self, x):
        shape = (*x.shape[:-1], -1, 8)
        q = self.q(x).view(shape).transpose(1, 2) * self.scaling
        q = self.norm(q)
        k, v = self.k(x).reshape(x.size(0), *shape[1:]), self.v(x)[..., None]
        w = torch.nn.functional.silu(self.w(x)) * v
        return self.o(q @ k + w)


class Child(Straight):
    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return self.m(x), self.n(x)


@pytest.mark.parametrize(
    ("kind", "expected", "sure"),
    [
        (Straight, {("a", "b"), ("c", "d")}, set()),
        (Branches, {("k", "v"), ("k2", "v2"), ("a", "b")}, {("k", "v"), ("k2", "v2")}),
        (Unsure, set(), set()),
        (OfNoConcern, {("q", "k", "v", "w")}, {("q", "k", "v", "w"), ("k", "v", "w")}),
        (Child, {("m", "n")}, {("m", "n")}),
        (nn.Linear, set(), set()),
        (nn.TransformerEncoderLayer, set(), set()),
        (type("Generated", (nn.Module,), {"forward": eval("lambda self, x: (self.a(x), self.b(x))")}), set(), set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_runs_in_the_source(kind, expected, sure):
    runs = calls_on_one_variable(kind)
    assert {run.names for run in runs if not run.is_sure} == expected
    assert {run.names for run in runs if run.is_sure} == sure


def test_runs_of_transformers_models():
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
    from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense
    from transformers.models.whisper.modeling_whisper import WhisperAttention

    expected = {
        LlamaAttention: ("q_proj", "k_proj", "v_proj"),
        LlamaMLP: ("gate_proj", "up_proj"),
        Qwen3Attention: ("q_proj", "k_proj", "v_proj"),
        BertSelfAttention: ("query", "key", "value"),
        T5Attention: ("k", "v"),  # in cross-attention q sees another tensor
        T5DenseGatedActDense: ("wi_0", "wi_1"),
        WhisperAttention: ("k_proj", "v_proj"),
    }
    for kind, names in expected.items():
        runs = calls_on_one_variable(kind)
        assert [run.names for run in runs if not run.is_sure] == [names]
        assert names in [run.names for run in runs if run.is_sure]


class Raising:
    def __getattr__(self, name):
        raise RuntimeError(name)


class Odd(Child):
    odd = Raising()


def test_a_class_that_cannot_be_read():
    assert calls_on_one_variable(Odd) == ()


class ColumnZero(nn.Module):
    def forward(self, x):
        """A text that
        begins in column 0, which no dedent takes for indented."""
        return self.a(x) + self.b(x)


def test_text_in_column_zero():
    assert ("a", "b") in [run.names for run in calls_on_one_variable(ColumnZero)]
