"""Benchmark cases in shapes for one CPU core and a moment."""

import dataclasses

import peft

from fastpeft.benchmark import compiled, gpu, groups, host, ia3, joint, layer, model, roofline, routed
from fastpeft.benchmark.cases import Case, Effort
from fastpeft.benchmark.libraries import OURS, REFERENCE

ITSELF = {OURS: peft, REFERENCE: peft}  # reference PEFT against itself: whatever differs is the harness's fault
ONCE = Effort(budget_s=0, warmup=0, min_rounds=2, max_rounds=2)
TINY_LLAMA = model.LlamaSize(layers=1, hidden=32, intermediate=48, heads=4, kv_heads=2, vocabulary=64)
CEILINGS = roofline.Ceilings("made up", 1e10, {"fp32": 1e11, "bf16": 2e11}, "nowhere")


def tiny(case: Case) -> Case:
    """A case in a shape for one CPU core and a moment."""
    if isinstance(case, groups.GroupCase):
        return dataclasses.replace(case, M=16, hidden=32, kv=16, intermediate=48, r=4)
    if isinstance(case, compiled.CompiledModelCase):
        return dataclasses.replace(case, batch=2, tokens=8, r=4, size=TINY_LLAMA, backend="aot_eager")
    if isinstance(case, host.HostModelCase):
        return dataclasses.replace(case, r=4, size=TINY_LLAMA)
    if isinstance(case, gpu.FusedLinearCase):
        return dataclasses.replace(case, size=32, M=16, r=4)
    if isinstance(case, gpu.LlamaLayerCase):
        return dataclasses.replace(case, M=16, hidden=32, kv=16, intermediate=48, r=4)
    if isinstance(case, ia3.IA3Case):
        return dataclasses.replace(case, M=16, K=32, N=24)
    if isinstance(case, layer.LayerCase):
        return dataclasses.replace(case, M=min(case.M, 16), K=32, N=24, r=4)
    if isinstance(case, routed.RoutedCase):
        return dataclasses.replace(case, tokens=min(case.tokens, 3), N=32, r=4)
    if isinstance(case, routed.RoutedGenerateCase):
        return dataclasses.replace(case, prompt=3, new=2, r=4, size=TINY_LLAMA)
    if isinstance(case, joint.JointCase):
        return dataclasses.replace(case, adapters=2, tokens=8)
    assert isinstance(case, model.ModelCase)
    return dataclasses.replace(case, batch=2, tokens=8, r=4, size=TINY_LLAMA)
