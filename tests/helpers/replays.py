"""Stand in for CUDA graphs on a CPU: a backend of torch.compile that overwrites its results."""

from functools import partial

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd


class Replays:
    """Runs forward and backward operation by operation, and keeps their results in memory of its own.

    As torch's graphs do (torch/_inductor/cudagraph_trees.py): every call returns the same memory, and a
    forward pass after a backward pass, or one without gradients, may write all of it. Here it writes NaN.
    Results that are inputs, such as saved weights, stay what they are. `log` has "forward" and "backward".
    """

    def __init__(self):
        self.log, self.num_graphs, self.is_over = [], 0, False
        self.memory = []
        compilers = {
            name: partial(self._compile, name)
            for name in ("fw_compiler", "bw_compiler", "inference_compiler")
        }
        self.backend = aot_autograd(**compilers)

    def _compile(self, name, graph, _):
        self.num_graphs += name == "fw_compiler"
        kept = {}

        def replay(*inputs):
            if name == "inference_compiler" or (name == "fw_compiler" and self.is_over):
                for tensor in self.memory:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 99)
            self.is_over = name == "bw_compiler"
            self.log.append("backward" if self.is_over else "forward")
            inside = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
            results = list(graph.forward(*inputs))
            for place, result in enumerate(results):
                if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in inside:
                    if place not in kept:
                        kept[place] = torch.empty_like(result)
                        self.memory.append(kept[place])
                    # Detached: autograd would not make a tensor .grad that somebody else holds.
                    results[place] = kept[place].copy_(result).detach()
            return results

        return make_boxed_func(replay)
