"""Do one optimizer step and keep everything that it changes.

    mix -> forward (autocast) -> loss -> backward -> propose                   once per micro-batch
    gradient norm -> commit or restore -> clip -> update -> EMA -> record      once per step

With AdamW and SGD the host never waits for the device, which decides by one flag whether a step counts: the
norm of the gradient, reduced over all ranks, is finite. So all ranks agree. Other optimizers cannot skip a
step on the device, and the host reads that flag. accelerate's `optimizer_step_was_skipped` is
not used: it is always False for fused optimizers (accelerate issue 4242).
"""

import copy
import gc
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from cmtrain.step.guard import Guard, running_statistics
from cmtrain.step.measure import Phases, Spike, SpikeDetector, StepBuffer, StepReport, extremes
from cmtrain.step.mixing import MixSpec, loss_of, mix, taught
from cmtrain.step.optimizer import Ema, add_gradients, set_frozen
from pipelines.spec import Batch

MIN_LOSS_SCALE = 1.0
# What torch, CUDA and cuBLAS raise
LACKS_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Learner:
    """Model, EMA, optimizer, guard, loss scaler, and the measurements since the last log point.

    `model` is on `accelerator.device`, not yet wrapped. `ema_decay`: per step; None: no EMA. `protect`:
    whether the guard refuses bad steps, or only counts them. `accumulation`: micro-batches per step on this
    rank. `clip_grad`: largest L2 norm of the gradient, or as `clip_mode` says; None: no clipping.
    `spike_sigma`: see SpikeDetector. `class_weights`: (num_classes,), in the loss. `teacher`: in evaluation
    mode. `frozen`: names, see set_frozen, until `unfreeze_step`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, *,
        ema_decay: float | None, protect: bool, spike_sigma: float, mixing: MixSpec, accumulation: int,
        clip_grad: float | None, seed: int, clip_mode: str = "norm", ema_warmup: bool = False,
        class_weights: Tensor | None = None, teacher: nn.Module | None = None,
        frozen: Collection[str] = (), unfreeze_step: float = math.inf,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.guard = Guard(model, protect=protect)
        # Copied before accelerate wraps the forward, or the copy would run the original's.
        self.ema = Ema(model, ema_decay, warmup=ema_warmup) if ema_decay else None
        self.wrapped = self._wrap()
        self.frozen, self.unfreeze_step = frozen, unfreeze_step
        self.mixing, self.accumulation, self.clip_grad, self.seed = mixing, accumulation, clip_grad, seed
        self.class_weights, self.clip_mode, self.teacher = class_weights, clip_mode, teacher
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.hyperparameters = {*optimizer.defaults, "lr_scale"} - {"lr"}
        self.buffer = StepBuffer(accelerator.num_processes)
        self.detector = SpikeDetector(spike_sigma)
        self.spikes: list[Spike] = []  # found by the last report
        self.spike_samples: list[int] = []  # this rank's samples of the highest of them
        self.last_indices: list[Tensor] = []  # sample indices of the last step, (B,) per micro-batch
        self.fresh_scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        self.phases = Phases(accelerator.device)
        self.last_forward: tuple[int, Tensor] | None = None  # torch's seed and the images
        self.images_per_pass: float = math.inf  # fewer, once a pass has run out of memory
        self.any_rank: Callable[[bool], bool] = bool  # whether this is true on any rank, for all together
        self.is_reading = False  # a batch: an error of the loader is none of a pass
        self.reduced_from: int | None = None  # number of collectives before the last backward pass

    def _wrap(self) -> Any:
        with warnings.catch_warnings():
            # torch 2.15 renames an argument of build.make_accelerator; older ones lack the new name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare_model(self.model, device_placement=False)  # it is there

    def _unfreeze(self) -> None:
        """Train everything from now on. For all ranks together."""
        self.average_over_ranks()  # DDP would give all ranks the first one's statistics
        for module in self.weights.values():
            set_frozen(module, self.frozen, frozen=False)
        if self.ema:
            self.ema.module.eval().requires_grad_(False)
        self.frozen, counters = (), self.guard.state_dict()
        self.guard = Guard(self.model, protect=self.guard.protect)
        self.guard.load_state_dict(counters)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.accelerator.num_processes > 1:  # DDP reduces only what had gradients when it was made
            self._wrap_again()

    def _wrap_again(self) -> None:
        """Make a new DDP, which gives all ranks the buffers of the first one. For all ranks together."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.wrapped = None
        self.accelerator.free_memory()
        gc.collect()  # now, or its hooks would act on the next gradients
        self.wrapped = self._wrap()

    def step(self, batches: Iterator[Batch], step: int, lr: float) -> int:
        """Do step number `step` (from 0) on the next micro-batches; return how many images this rank had.
        Where a rank runs out of memory, all do the step again, in passes of fewer images.
        """
        if self.frozen and step >= self.unfreeze_step:
            self._unfreeze()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        taken: list[Batch] = []
        while True:
            loss, failed = None, ""
            try:
                loss = self._forward_and_backward(taken, batches, step)
            except RuntimeError as error:
                if self.is_reading or not any(text in str(error) for text in LACKS_MEMORY):
                    raise
                failed = str(error)  # alone: the error itself keeps all activations
            if failed:
                self._join_reductions()
            if not self.any_rank(bool(failed)) and loss is not None:
                break
            self._take_fewer(len(taken[0].indices), failed)
        self.phases.begin("optimizer")
        self._update(loss, step)
        self.phases.end_step()
        return sum(len(indices) for indices in self.last_indices)

    def _forward_and_backward(self, taken: list[Batch], batches: Iterator[Batch], step: int) -> Tensor:
        """Do what a step does before the optimizer; return this rank's mean loss. `taken`: micro-batches
        that were read already; those read from `batches` are added.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.reduced_from = None
        loss_of_step = torch.zeros((), device=self.accelerator.device)
        self.last_indices = []
        for turn in range(self.accumulation):
            self.phases.begin("")
            if turn == len(taken):
                self.is_reading = True
                taken.append(next(batches))
                self.is_reading = False
            images, labels, indices = taken[turn]
            passes = self._num_passes(len(images))
            for number in range(passes):
                self.phases.begin("forward")
                # The number of this micro-batch within the global batch, whichever rank works on it.
                turns = turn + number * self.accumulation
                micro = self.accelerator.process_index + turns * self.accelerator.num_processes
                torch_seed = _torch_seed(self.seed, step, micro)
                torch.manual_seed(torch_seed)
                if number == 0:
                    images, targets = mix(images, labels, self.mixing, (self.seed, step, micro))
                part = slice(number, None, passes)  # as a plan of such micro-batches divides the samples
                is_last = turn == self.accumulation - 1 and number == passes - 1
                count = self.accumulation * len(images) / len(images[part])
                loss_of_step += self._pass(images[part], targets[part], torch_seed, count, is_last)
                self.last_indices.append(indices[part])
        return loss_of_step

    def _pass(self, images: Tensor, targets: Tensor, torch_seed: int, count: float, is_last: bool) -> Tensor:
        """Do one forward and backward pass, one of `count` of this size in a step; return its share of the
        loss. With the `is_last` one, ranks add up their gradients.
        """
        if count > self.accumulation:  # a part of a micro-batch, whose images lie apart
            images = images.contiguous(memory_format=torch.channels_last)
        self.last_forward = torch_seed, images
        with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
            with self.guard.uncounted():
                logits = self.wrapped(images).float()
            loss = loss_of(logits, targets, self.mixing, self.class_weights)
            if self.teacher:
                with torch.no_grad(), self.accelerator.autocast():
                    answers = self.teacher(images).float()
                loss = taught(loss, logits, answers, self.mixing)
            self.phases.begin("backward")
            self.reduced_from = self._num_collectives() if is_last else None
            self._backward(loss / count, is_last and (count == 1 or self.accelerator.num_processes > 1))
        self.guard.propose()
        return loss.detach() / count

    def _num_passes(self, size: int) -> int:
        """Return into how many passes, of two images at least, a micro-batch of `size` images is divided."""
        return max(1, min(math.ceil(size / self.images_per_pass), size // 2))

    def _take_fewer(self, size: int, failed: str) -> None:
        """Undo a step before its update; from now on, divide micro-batches of `size` images further. For all
        ranks. `failed`: why this rank's step did; "": another rank's did. Raises OutOfMemoryError: a pass
        would have a single image.
        """
        passes = self._num_passes(size)
        if passes >= size // 2:
            raise torch.OutOfMemoryError(failed or "another rank ran out of memory")
        self.images_per_pass = size // min(2 * passes, size // 2)
        self._free()
        if self.accelerator.num_processes > 1:
            self._wrap_again()
        self.guard.discard()

    def _free(self) -> None:
        """Free what a step holds that was given up."""
        self.optimizer.zero_grad(set_to_none=True)
        self.last_forward, self.phases.marks = None, []
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def _num_collectives(self) -> int:
        group: Any = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        return group._get_sequence_number_for_group() if group else 0

    def _join_reductions(self) -> None:
        """Take part in what the other ranks' backward passes will still reduce: they wait for it, and all
        throw the result away. As torch's Join does it.
        """
        if self.accelerator.num_processes == 1:
            return
        self._free()
        reducer, done = self.wrapped.reducer, 0
        if self.reduced_from is None:
            reducer._rebuild_buckets()  # as their forward pass may do
        else:
            done = self._num_collectives() - self.reduced_from
        for bucket in reducer._get_zeros_like_grad_buckets()[done:]:
            dist.all_reduce(bucket.buffer())

    def _backward(self, loss: Tensor, by_autograd: bool) -> None:
        """Add the gradients of a pass to every .grad; DDP reduces them with those of the last one.
        autograd would make the first gradients .grad itself, where a CUDA graph's next replay would write.
        """
        if by_autograd:
            self.accelerator.backward(loss)
            return
        scaler = self.accelerator.scaler
        scaled = loss if scaler is None else scaler.scale(loss)
        add_gradients(self.parameters, torch.autograd.grad(scaled, self.parameters, allow_unused=True))

    @torch.no_grad()
    def _update(self, loss: Tensor, step: int) -> None:
        if (scaler := self.accelerator.scaler) is not None:
            scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.clip_grad and self.clip_mode == "value":
            nn.utils.clip_grad_value_(self.parameters, self.clip_grad, foreach=True)
        elif self.clip_grad and self.clip_mode == "agc":
            from timm.utils.agc import adaptive_clip_grad

            adaptive_clip_grad([*self.model.parameters()][:-2], self.clip_grad)  # timm: not the classifier
        elif self.clip_grad:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, grad_norm, foreach=True)
        ok = grad_norm < math.inf  # also not NaN, by one kernel; isfinite takes four
        takes_step = self.guard.commit_or_restore(ok)
        # Fused optimizers write nothing where found_inf is 1. Unguarded fp16 skips, as GradScaler does.
        writes = takes_step if scaler is None else ok
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~writes).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif writes:  # the host waits for the device
            self.optimizer.step()
        if scaler is not None:
            scaler.update()
            # torch has no floor: after 165 overflows in a row the scale is 0, and a good step writes NaN.
            scaler._scale.clamp_(min=MIN_LOSS_SCALE)
        if self.ema is not None:
            self.ema.update(takes_step, step)
        self.buffer.add(loss, grad_norm, self.last_indices)

    def report(self, step: int, epoch: int, lr: float, *, reset: bool) -> StepReport:
        """Report on the steps since the last log point, up to `step`, and find the spikes among them.
        `reset`: the next report begins after this one. Synchronises; all ranks must call it.
        """
        measured = self.buffer.read()
        detector = self.detector if reset else copy.copy(self.detector)
        self.spikes = detector.find_spikes(step - len(measured), measured)
        highest = max(self.spikes, key=lambda spike: spike.z, default=None)
        self.spike_samples = self.buffer.samples(step - highest.step) if highest else []
        if reset:
            self.buffer.clear()
        # One copy to the host for all numbers; a counter is exact in float64.
        counters, sizes = self.guard.state_dict(), extremes(self.model)
        values = torch.stack([value.double() for value in (counters | sizes).values()]).tolist()
        numbers = dict(zip(counters | sizes, values, strict=True))
        numbers |= {name: int(numbers[name]) for name in counters}
        numbers |= {"spikes": detector.num_spikes, "good_steps_in_a_row": detector.good_steps_in_a_row}
        good = [loss for loss, grad_norm in measured if math.isfinite(grad_norm)]
        loss = sum(good) / len(good) if good else math.nan
        grad_norm = measured[-1][1] if measured else math.nan
        scaler = self.accelerator.scaler
        return StepReport(step, epoch, loss, lr, grad_norm, scaler.get_scale() if scaler else 1.0, **numbers)

    def roll_back(self, state: dict[str, Any]) -> None:
        """Go back to an earlier state_dict of this process, with a fresh loss scale. Counters go on."""
        spikes = {"num_spikes": self.detector.num_spikes, "good_steps_in_a_row": 0}
        kept = {"guard": self.guard.state_dict(), "window": {"steps": []}}
        self.load_state_dict(state | kept | {"spikes": state["spikes"] | spikes})
        self.guard.bad_steps_in_a_row.zero_()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.fresh_scaler)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the last micro-batch through the model once more, for forward hooks to see; change nothing."""
        if self.last_forward is not None:
            seed, images = self.last_forward
            torch.manual_seed(seed)
            with self.accelerator.autocast(), self.guard.uncounted():
                self.model(images)
            self.guard.discard()

    @property
    def weights(self) -> dict[str, nn.Module]:
        """The models to evaluate: `model`, and `ema` if there is one."""
        return {"model": self.model} | ({"ema": self.ema.module} if self.ema else {})

    @torch.no_grad()
    def average_over_ranks(self) -> None:
        """Give every rank the mean of all ranks' running statistics, before evaluating or saving."""
        if self.accelerator.num_processes > 1:
            for statistics in filter(None, map(running_statistics, self.weights.values())):
                mean = self.accelerator.reduce(torch.cat(statistics), "mean")
                torch._foreach_copy_(statistics, list(mean.split([t.numel() for t in statistics])))
        self.guard.accept_current()

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a state, the weights before the guard, which reads them."""
        parts = {**self.weights, "optimizer": self.optimizer, "guard": self.guard}
        parts |= {"spikes": self.detector, "window": self.buffer, "scaler": self.accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return everything a step changes, equal on all ranks. Synchronises; all ranks must call it."""
        self.average_over_ranks()
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = [{name: group[name] for name in self.hyperparameters} for group in self.optimizer.param_groups]
        for name, part in self._parts.items():
            if name in state or name != "scaler":  # saved where there was none
                part.load_state_dict(state[name])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group |= values  # which --resume force may change


def _torch_seed(seed: int, step: int, micro: int) -> int:
    """Return torch's seed for a micro-batch: (seed, step, micro) spread over 63 bits.
    Dropout, drop path and the noise of random erasing draw from it, and mixing from numpy's generator for
    the same key: a resumed run, or one on another number of ranks, draws the same.
    """
    mask = 2**64 - 1
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB) & mask
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & mask
    return (mixed ^ (mixed >> 32)) >> 1
