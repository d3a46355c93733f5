"""Make learners and batches for the tests on a GPU."""

import timm
import torch
from accelerate import Accelerator

import cmtrain.models  # noqa: F401
from cmtrain.processes.collectives import set_cuda_math
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import MixSpec
from cmtrain.step.optimizer import make_optimizer
from helpers.synthetic import noise_batches
from pipelines.plan import Plan
from pipelines.spec import Placement


def make_learner(opt="adamw", precision="fp16", compile_mode=None, accumulation=2, **mixing):
    accelerator = Accelerator(mixed_precision=precision)
    set_cuda_math(precision)  # as training does
    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", img_size=160, num_classes=10, drop_path_rate=0.1)
    model = model.to("cuda", memory_format=torch.channels_last)
    if compile_mode is not None:
        model.compile(mode=compile_mode)
    optimizer = make_optimizer(
        model, opt=opt, lr=1e-3, weight_decay=0.05, momentum=0.9, nesterov=True, betas=(0.9, 0.999), eps=1e-8
    )
    spec = MixSpec(10, mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25, **mixing)
    return Learner(
        model, optimizer, accelerator, ema_decay=0.999, protect=True, spike_sigma=6.0, mixing=spec,
        accumulation=accumulation, clip_grad=5.0, seed=0,
    )  # fmt: skip


def batches(fp16=True):
    plan = Plan(0, 1024, 128, 64)
    return noise_batches(plan, 160, 10, Placement(device="cuda"), fp16=fp16)
