"""How large a model's numbers are: what grows before it overflows."""

import torch
from torch import Tensor, nn

from cmtrain.step.guard import running_statistics


@torch.no_grad()
def extremes(model: nn.Module) -> list[Tensor]:
    """Scalars on the model's device: largest |running_mean| and largest running_var of all BatchNorm layers (0 without
    any), and the L2 norm of all trainable parameters together. NaN where there is a NaN. For log points."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    norm = torch.stack(torch._foreach_norm(parameters)).norm()
    statistics = running_statistics(model)
    if not statistics:
        return [torch.zeros_like(norm), torch.zeros_like(norm), norm]
    means, variances = torch.cat(statistics[0::2]), torch.cat(statistics[1::2])
    return [means.abs().max(), variances.max(), norm]
