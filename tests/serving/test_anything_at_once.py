"""Threads that do whatever they like with one engine: no answer is of a mixture of versions, none is lost."""

import random
import threading
import time

import pytest
import serving_cases as cases

from fastpeft.serving import RequestCancelledError, ServingError

SECONDS, THREADS, SOURCES, NAMES = 4.0, 4, 6, 5
WAIT = 60
ACTIONS = {"submit": 60, "change": 15, "add": 10, "remove": 5, "pin": 3, "unpin": 4, "prefetch": 3}  # how often


class Caller:
    """One thread's requests and changes, drawn from a seed."""

    def __init__(self, engine, seed, folders, given, prompts, sources, lock):
        self.engine, self.rng, self.prompts = engine, random.Random(seed), prompts
        self.folders, self.given = folders, given
        self.sources, self.lock = sources, lock  # version -> number of its weights, of all callers
        self.open, self.answers, self.errors, self.cancelled, self.refused = [], [], [], 0, 0

    def run(self, until):
        while time.monotonic() < until:
            try:
                self.step(f"n{self.rng.randrange(NAMES)}")
            except ServingError:  # somebody else has removed it, or added it, or all slots are pinned
                self.refused += 1
            if self.rng.random() < 0.3:
                time.sleep(self.rng.random() * 0.01)
        while self.open:
            self.close()

    def step(self, name):
        match self.rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]:
            case "submit":
                number = self.rng.randrange(len(self.prompts))
                handle = self.engine.submit(self.prompts[number], name, stream=self.rng.random() < 0.5)
                self.open.append((handle, number))
                if self.rng.random() < 0.2:
                    handle.cancel()
                if len(self.open) > 6:
                    self.close()
            case "change":
                self.register(self.engine.replace_adapter, name)
            case "add":
                self.register(self.engine.add_adapter, name)
            case "remove":
                self.engine.remove_adapter(name)
            case other:
                getattr(self.engine, other)(name)

    def register(self, method, name):
        number = self.rng.randrange(SOURCES)
        config, weights = self.given[number]
        with self.lock:
            from_disk = self.rng.random() < 0.6
            version = method(name, self.folders[number]) if from_disk else method(name, weights, config)
            self.sources[version] = number

    def close(self):
        handle, prompt = self.open.pop(0)
        try:
            answer = handle.result(WAIT)
        except RequestCancelledError:
            self.cancelled += 1
        except ServingError as error:
            self.errors.append(str(error))
        else:
            self.answers.append((handle.version, prompt, answer))


@pytest.mark.parametrize("seed", [0, 1])
def test_anything_at_once(tmp_path, seed):
    maker, prompts = cases.AdapterMaker(), cases.prompts(3, shared=8)
    given = [maker.weights(i, cases.LORA_KINDS[i % 5]) for i in range(SOURCES)]
    folders = [maker.save(tmp_path / str(i), i, cases.LORA_KINDS[i % 5]) for i in range(SOURCES)]
    oracle = cases.Alone()
    want = [oracle.answers(folder, prompts) for folder in folders]
    limit = 16 * sum(weight.nbytes for weight in given[4][1].values())
    sources, lock = {}, threading.Lock()
    with cases.no_threads_left(), cases.engine(slots=3, cpu_bytes=limit) as engine:
        callers = [Caller(engine, 10 * seed + i, folders, given, prompts, sources, lock) for i in range(THREADS)]
        until = time.monotonic() + SECONDS
        threads = [threading.Thread(target=caller.run, args=(until,)) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        status = engine.status()
        assert (status.running, status.waiting) == (0, 0)
        assert status.cpu_bytes <= limit
    answers = [answer for caller in callers for answer in caller.answers]
    assert answers == [(version, prompt, want[sources[version]][prompt]) for version, prompt, _ in answers]
    assert all("all slots are pinned" in error for caller in callers for error in caller.errors)
    assert len({version for version, _, _ in answers}) > 10
    assert sum(caller.cancelled for caller in callers) > 3
