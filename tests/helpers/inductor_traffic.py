"""What inductor counts of a compiled training step of CMT-Ti at 160 px: bytes an image, a line of JSON.

    python tests/helpers/inductor_traffic.py eager | fused

The step is compiled for the CPU, which no GPU kernel can be, but inductor's schedule knows what every group of
operations reads and writes whatever it is compiled for. Projections take the form they have on CUDA. The Triton kernels
give out memory that nobody has written to:
only their shapes count. In a process of its own, because that cannot be taken back.
"""

import json
import logging
import sys
import warnings

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config, metrics
from torch._library.custom_ops import CustomOpDef

import cmtrain.models  # noqa: F401
from cmtrain.models import blocks, ffn_operators

BATCH = 64


def main(ffn_kernel: str) -> None:
    warnings.simplefilter("ignore")
    for name, operator in list(vars(ffn_operators).items()):
        if isinstance(operator, CustomOpDef):
            operator.register_kernel("cpu")(getattr(ffn_operators, f"_{name}_fake"))
    blocks.pointwise = lambda x, weight, bias: blocks._map(F.linear(blocks._tokens(x), weight, bias))
    config.force_disable_caches = True  # what is not compiled is not counted
    torch._logging.set_logs(inductor_metrics=True)  # inductor counts where somebody asked to be told
    logging.getLogger("torch").handlers.clear()
    torch.set_num_threads(1)

    model = timm.create_model("cmt_ti", ffn_kernel=ffn_kernel).to(memory_format=torch.channels_last)
    model.compile()
    images = torch.randn(BATCH, 3, 160, 160).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(images)
    forward_bytes = metrics.num_bytes_accessed
    logits.float().sum().backward()
    both = metrics.num_bytes_accessed
    print(
        json.dumps(
            {"forward_bytes": forward_bytes / BATCH, "backward_bytes": (both - forward_bytes) / BATCH}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
