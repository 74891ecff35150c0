"""How close is close enough: no tolerance is tuned by hand, eager torch's own error against fp64 is the measure."""

import torch
from torch import Tensor


def assert_as_close_as_torch(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Ours may be off from `exact` (fp64) by twice what eager torch is, and by one rounding of the largest entry."""
    exact = exact.double()
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error = (ours.double() - exact).abs().max() if ours.numel() else torch.tensor(0.0)
    allowed = (eager.double() - exact).abs().max() if eager.numel() else torch.tensor(0.0)
    bar = 2 * allowed + torch.finfo(eager.dtype).eps * (exact.abs().max() if exact.numel() else 0.0)
    assert error <= bar, f"{name}: off by {error:.3e}, eager torch by {allowed:.3e}; the bar is {bar:.3e}"
