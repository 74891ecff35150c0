"""What DoRA keeps beside the LoRA factors: one trained length for each row of the weight. arXiv:2402.09353."""

import torch
from torch import Tensor, nn


class DoraLinearLayer(nn.Module):
    """The magnitude of a linear layer's rows, (N,); named as in PEFT, whose layer reports show it.

    Its entry in a file is called like the container that it is in: `lora_magnitude_vector`, without `.weight`.
    """

    single_weight_in_files = True

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)

    def forward(self, norm: Tensor) -> Tensor:
        """What the rows of the changed weight are multiplied by: (N,)."""
        return self.weight / norm

    def __repr__(self) -> str:
        return f"lora.dora.{super().__repr__()}"


@torch.no_grad()
def initial_magnitude(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of W + scaling · B A, (N,) in W's dtype: at first the layer is what it was.

    Rounded as in PEFT, so that the bits are the same: all in W's dtype, fp16 products in fp32.

    Args:
        W: (N, K).
        A: (r, K), W's dtype, or on the meta device.
        B: (N, r), A's dtype.
    """
    delta = (B.float() @ A.float()).half() if A.dtype == torch.float16 else B @ A
    return torch.linalg.norm(W.to(A.device) + scaling * delta, dim=1).to(W.dtype)
