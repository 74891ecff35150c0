"""Counts small shapes in Triton's interpreter and writes counted.json, what prediction.py predicts from: minutes.

TRITON_INTERPRET=1 python -m fastpeft.benchmark.recount
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpeft.benchmark.budget import by_kind, count, count_group
from fastpeft.benchmark.prediction import COUNTED, MOST_MEMBERS, dot, key
from fastpeft.benchmark.traffic import Traffic
from fastpeft_kernels.tiles import ProductBy

# M, K, N of each member at which the terms tell themselves apart: bands and strips enough that dS, dA and dB are sums
# of planes, and K so small that S is not, as with many rows.
PROBES = ((576, 64, 320), (576, 128, 192), (640, 64, 192))


def recount() -> dict[str, Any]:
    """The coefficients of counted.json, from the probes.

    Raises:
        RuntimeError: the probes moved what the formula does not give.
    """
    ops: list[tuple[int, ProductBy]] = [(n, "library") for n in range(1, MOST_MEMBERS + 1)] + [(1, "own")]
    return {
        key(n, dropout, product_by): _coefficients(n, dropout, product_by)
        for (n, product_by), dropout in itertools.product(ops, (0.0, 0.1))
    }


def _coefficients(
    members: int, dropout: float, product_by: ProductBy, r: int = 16
) -> dict[str, dict[str, list[float]]]:
    def probe(M: int, K: int, N: int) -> tuple[Traffic, Traffic]:
        if members > 1:
            return count_group(M, K, [N] * members, r, dropout)
        return count(M, K, N, r, dropout, product_by=product_by)

    found: dict[str, dict[str, list[float]]] = {}
    for way, parts in zip(("forward", "backward"), zip(*(probe(*p) for p in PROBES), strict=True), strict=True):
        moved = [by_kind(part) for part in parts]
        shapes = [(M, K, members * N) for M, K, N in PROBES]
        found[way] = {
            "wide": _solve([(M * K, M * N) for M, K, N in shapes], [m.wide for m in moved]),
            "factors": _solve([(r * M, r * K, r * N) for M, K, N in shapes], [m.factors for m in moved]),
        }
    return found


def _solve(terms: Sequence[tuple[int, ...]], counts: Sequence[int]) -> list[float]:
    """The coefficients, multiples of 1/8, of the linear function that gives `counts` at `terms`, but for a seed."""
    solution, *_ = np.linalg.lstsq(np.array(terms, float), np.array(counts, float), rcond=None)
    coefficients = [round(8 * float(c)) / 8 for c in solution]
    if any(abs(dot(coefficients, t) - c) > 64 for t, c in zip(terms, counts, strict=True)):
        raise RuntimeError(f"the counted bytes {list(counts)} are no linear function of {list(terms)}")
    return coefficients


if __name__ == "__main__":
    COUNTED.write_text(json.dumps(recount(), indent=1) + "\n")
