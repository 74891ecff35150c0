"""200 adapters registered, 16 resident, 1,000 requests in random order: every answer is that of its adapter alone."""

import gc
import random

import pytest
import serving_cases as cases
import torch

ADAPTERS, SLOTS, REQUESTS, AT_ONCE = 200, 16, 1000, 48
WAIT = 120


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of each adapter, five kinds of them; and (adapter, prompt) of each request."""
    root, maker, rng = tmp_path_factory.mktemp("adapters"), cases.AdapterMaker(), random.Random(5)
    folders = [maker.save(root / f"a{i}", i, cases.LORA_KINDS[i % 5]) for i in range(ADAPTERS)]
    prompts = cases.prompts(REQUESTS, seed=5, shared=8)  # two pages that all of them could share
    return folders, [(rng.randrange(ADAPTERS), prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def alone(work):
    """Each adapter by itself: loaded as PEFT does, a fresh manager without sharing."""
    folders, requests = work
    oracle, answers = cases.Alone(), {}
    for adapter in range(ADAPTERS):
        mine = [i for i, (other, _) in enumerate(requests) if other == adapter]
        if mine:
            found = oracle.answers(folders[adapter], [requests[i][1] for i in mine])
            answers.update(zip(mine, found, strict=True))
    return [answers[i] for i in range(REQUESTS)]


def held(engine):
    """Bytes of all tensors but those in the CPU tier, which holds other adapters from time to time."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]
    return sum(t.nbytes for t in tensors) - engine.status().cpu_bytes


@pytest.mark.slow
def test_every_answer_is_that_of_its_adapter_alone(work, alone):
    folders, requests = work
    limit = 40 * max(folder.joinpath("adapter_model.safetensors").stat().st_size for folder in folders)
    rng, handles, counts = random.Random(6), [], []
    with cases.no_threads_left(), cases.engine(slots=SLOTS, cpu_bytes=limit) as engine:
        for i, folder in enumerate(folders):
            engine.add_adapter(f"a{i}", folder)
        engine.pin("a0")
        for i, (adapter, prompt) in enumerate(requests):
            if i >= AT_ONCE:
                handles[i - AT_ONCE].result(WAIT)
            handles.append(engine.submit(prompt, f"a{adapter}", stream=rng.random() < 0.3))
            if i % 10 == 0:
                busy = f"a{rng.randrange(ADAPTERS)}"
                match rng.randrange(3):  # the same weights: versions change, answers must not
                    case 0:
                        engine.replace_adapter(busy, folders[int(busy[1:])])
                    case 1:
                        engine.remove_adapter(busy)
                        engine.add_adapter(busy, folders[int(busy[1:])])
                    case 2:
                        engine.prefetch(busy)
            if i in (500, 999):
                for handle in handles:
                    handle.exception(WAIT)
                for j in range(1, SLOTS):  # the same adapters in the slots each time
                    engine.submit([5, 6, 7], f"a{j}").result(WAIT)
                    assert engine.status().cpu_bytes <= limit
                counts.append((engine.status().device_bytes, held(engine)))
        status = engine.status()
        assert [handle.result(WAIT) for handle in handles] == alone
        assert (len(status.resident), status.running, status.waiting) == (SLOTS, 0, 0)
        assert status.loads > 700
        assert counts[0][0] == counts[1][0]
        assert abs(counts[1][1] - counts[0][1]) < 100_000, counts  # an adapter has some 10,000
