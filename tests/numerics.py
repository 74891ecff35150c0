"""How close is close enough: no tolerance is tuned by hand, eager torch's own error against fp64 is the measure."""

import torch
from torch import Tensor


def assert_as_close_as_torch(
    name: str, ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Ours may be off from `exact` (fp64) by twice what eager torch is, and by one rounding of the largest entry.

    Args:
        dtype: what that one rounding is to; eager's own dtype, unless the way there was narrower (a bf16 model).
    """
    exact = exact.double()
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error = (ours.double() - exact).abs().max() if ours.numel() else torch.tensor(0.0)
    allowed = (eager.double() - exact).abs().max() if eager.numel() else torch.tensor(0.0)
    bar = 2 * allowed + torch.finfo(dtype or eager.dtype).eps * (exact.abs().max() if exact.numel() else 0.0)
    assert error <= bar, f"{name}: off by {error:.3e}, eager torch by {allowed:.3e}; the bar is {bar:.3e}"


def assert_no_noisier_than_torch(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """All tensors together may be off from `exact` by twice what eager torch is: for whole models, whose single entries
    are as much luck as precision once they went through many narrow layers."""

    def error(tensors: dict[str, Tensor]) -> float:
        # every tensor counts alike, whatever its scale
        return (
            sum(
                float((tensors[name].detach().double() - t.double()).norm() / t.double().norm().clamp_min(1e-30)) ** 2
                for name, t in exact.items()
            )
            ** 0.5
        )

    assert ours.keys() == eager.keys() == exact.keys()
    assert error(ours) <= 2 * error(eager), f"off by {error(ours):.3e}, eager torch by {error(eager):.3e}"
