"""Two processes on one machine: data parallel, and sharded by decoder layer. All stays fused, and the numbers right."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from models import batch, tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastpeft
from fastpeft.tuners.lora import fused
from fastpeft_kernels import dispatch

WORLD = 2


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return fastpeft.get_peft_model(tiny_llama(use_cache=False), config).train()


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_and_checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return sharded(model)


WRAPPERS = {f.__name__: f for f in (data_parallel, sharded, sharded_and_checkpointed)}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in named}


def check_one_step(rank: int, wrapper: str) -> None:
    alone = adapted()
    for part in range(WORLD):
        (alone(**batch("llama", seed=part)).loss / WORLD).backward()

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        alone_op, group_op = fused.lora_linear, fused.lora_group
        patch.setattr(dispatch, "MOST_ELEMENTS", 0)  # the inputs are small
        patch.setattr(fused, "lora_linear", lambda *args: calls.append(1) or alone_op(*args))
        patch.setattr(fused, "lora_group", lambda x, members: calls.append(len(members)) or group_op(x, members))
        model = WRAPPERS[wrapper](adapted())
        model(**batch("llama", seed=rank)).loss.backward()
    passes = 2 if "checkpointed" in wrapper else 1
    assert sum(calls) == passes * len(fastpeft.explain(alone)), f"{wrapper}: a layer was not fused"
    assert {2, 3} < set(calls), f"{wrapper}: q, k and v, or gate and up, were not computed together"

    together, exact = gradients(model), gradients(alone)
    assert together.keys() == exact.keys(), wrapper
    for name, grad in together.items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{wrapper} {n}: {m}")


def check_all(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        for wrapper in WRAPPERS:
            check_one_step(rank, wrapper)
    finally:
        dist.destroy_process_group()


def test_gradients_are_those_of_one_process():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(check_all, (port,), nprocs=WORLD)
