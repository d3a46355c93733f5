"""Print inductor's count of bytes per image in a compiled training step of CMT-Ti at 160 px, as JSON.

    python tests/helpers/inductor_traffic.py eager | fused

The step is compiled for the CPU. Inductor's schedule knows the reads and writes of every group of operations
on any device. Projections take the form they have on CUDA. The Triton kernels are not launched: only the
shapes of their results count. It needs a process of its own, because none of this can be undone.
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

import cmtrain.models  # noqa: F401
from cmtrain.models import blocks, ffn_operators

BATCH = 64


def main(ffn_kernel: str) -> None:
    warnings.simplefilter("ignore")
    ffn_operators.launch = lambda *_, **__: None
    blocks.pointwise = lambda x, weight, bias: blocks._map(F.linear(blocks._tokens(x), weight, bias))
    config.force_disable_caches = True  # a graph from the cache is not counted
    torch._logging.set_logs(inductor_metrics=True)  # inductor counts only where it logs the counts
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
