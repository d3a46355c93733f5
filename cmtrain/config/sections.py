"""Define every configuration key: its type, limits, default and meaning, one pydantic model per section.

Names follow timm where timm has a name. Values are strict: "512" is not a number and `yes` is not true.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipelines.spec import MAX_BAD_FRACTION, Decode, Interpolation, is_url


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be text of at least one character, without control characters")
    return text


# What Linux allows a name, and a quarter of what it allows a path: paths are joined, and files come below.
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1024


def _path(text: str) -> str:
    if re.match(r"~[\w.-]*(/|$)|[$]\{?\w", text):
        first = text.split("/")[0]
        advice = f"write the folder out (or ./{first} if it is a name)"
        raise ValueError(f"{first} is expanded by no shell here: {advice}")
    longest = max(len(part.encode()) for part in _printable(text).split("/"))
    if len(text.encode()) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES:
        limits = f"{MAX_PATH_BYTES} bytes, and {MAX_NAME_BYTES} between two slashes"
        raise ValueError(f"must be a path of at most {limits}")
    return text


def _below_root(text: str) -> str:
    if text.startswith("/") or ".." in text.split("/"):
        raise ValueError("must be below data.root: not absolute, and without ..")
    return _path(text)


def _root(text: str) -> str:
    if "://" in text and (not is_url(text) or re.search(r"[?#]|//.*@|//(/|$)", text)):
        raise ValueError("must be a plain place, as s3://bucket/imagenet-256; keys are for the environment")
    return _path(text)


Text = Annotated[str, AfterValidator(_printable)]
AnyPath = Annotated[str, AfterValidator(_path)]
Root = Annotated[str, AfterValidator(_root)]
PathBelowRoot = Annotated[str, AfterValidator(_below_root)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
FromList = Field(strict=False)  # a list is as good as a tuple
Pair = Annotated[tuple[Positive, Positive], FromList]
Scale = Annotated[tuple[Positive, Fraction], FromList]
Betas = Annotated[tuple[FractionBelowOne, FractionBelowOne], FromList]
Mean = Annotated[tuple[float, float, float], FromList]
Std = Annotated[tuple[Positive, Positive, Positive], FromList]
Texts = Annotated[tuple[str, ...], FromList]
Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab",
]  # fmt: skip
Trackers = Annotated[tuple[Tracker, ...], FromList]
Optimizer = Literal[
    "adamw", "sgd", "adamp", "adamuon", "adan", "adopt", "lamb", "lars", "lion", "muon", "nadamuon",
    "nadamw", "rmsproptf",
]  # fmt: skip


def _key(default: Any, description: str | None = None, **limits: Any) -> Any:
    """Declare a key: its default, its meaning, which a docstring below the key replaces, and its limits."""
    return Field(default, description=description, **limits)


class Section(BaseModel, use_attribute_docstrings=True):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    name: str | None = _key(None, pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    """name of the run and of its folder below run.dir; null: the name of the configuration file"""
    dir: AnyPath = _key("runs", "folder that holds the run folders; on several nodes, one that all share")
    imports: Texts = ()
    """your modules, with models that they register with timm or augment.extra: NAME for NAME.py in this
    folder or on Python's path; a run adds @ and the hash of the source"""
    seed: int = _key(42, "random seed of initial weights, sample order and every draw", ge=0, le=2**31 - 1)


class Model(Section):
    name: str = _key("cmt_ti", "CMT or any model of timm", pattern="^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    variant: Literal["paper", "reimpl"] = "paper"
    """paper: the official architecture (arXiv 2107.06263 v2); reimpl: the re-implementation's"""
    num_classes: Count | None = _key(None, "outputs of the classifier; null: as many as the data has")
    attention_bias: Literal["none", "relative", "pairwise"] | None = None
    """position bias of attention, by offset or by (query, key) pair; null: the variant's own"""
    attention_bias_scope: Literal["stage", "block"] | None = None
    """one bias table per stage or per block; null: the variant's own"""
    absolute_position: bool = _key(False, "add a learned position embedding (the re-implementation's ape)")
    absolute_position_px: int | None = _key(None, ge=4, multiple_of=4)
    """image side of its table; null: data.image_px"""
    qkv_bias: bool = _key(True, "bias in the query, key and value projections")
    drop_rate: FractionBelowOne = _key(0.0, "dropout probability before the classifier")
    attn_drop_rate: FractionBelowOne = _key(0.0, "dropout probability of attention weights")
    proj_drop_rate: FractionBelowOne = _key(0.0, "dropout probability after the projections of a block")
    drop_path_rate: FractionBelowOne = _key(0.0, "stochastic depth: probability at the last block")
    ffn_kernel: Literal["auto", "fused", "eager"] = "auto"
    """fused: feed-forward networks, perception units and LayerNorm by Triton; eager: operation by operation;
    auto: fused where the GPU can"""
    pretrained: bool | Annotated[str, Field(pattern="^(hf-hub:)?[A-Za-z0-9][A-Za-z0-9._/@-]*$")] = False
    """true: start from timm's weights; or a tag of them, as a1_in1k; or hf-hub:NAME; data.mean, std,
    interpolation, eval_interpolation and eval_resize_px are theirs unless they are set"""
    init_from: AnyPath | None = None
    """run, checkpoint, export folder or any trainer's .safetensors, .pth, .pt or .bin to start from; image
    size and classes may differ; null: random weights"""
    freeze: Literal["backbone"] | Texts | None = None
    """what stays as it is: backbone, all but the classifier; or patterns of parameter names, such as
    [stem.*]; a BatchNorm whose running_mean matches keeps its statistics; null: nothing"""
    unfreeze_epoch: Count | None = _key(None, "epochs after which all of it is trained; null: never")


# The keys of Model that only CMT has.
CMT_OPTIONS = (
    "variant", "attention_bias", "attention_bias_scope", "absolute_position", "absolute_position_px",
    "qkv_bias", "attn_drop_rate", "proj_drop_rate", "ffn_kernel",
)  # fmt: skip


class Data(Section):
    root: Root
    """folder that holds the images; s3://, gs://, az:// or https:// and the place of packed ones; or
    demo:digits, demo:photos or demo:jpegs"""
    cache_gb: Positive = _key(200.0, "most of the disk of cache_dir that the copy of a bucket may take")
    train_dir: PathBelowRoot = _key("train", "<class>/<image> tree of the training images, below root")
    val_dir: PathBelowRoot = _key("val", "<class>/<image> tree of the validation images, below root")
    train_list: AnyPath | None = None
    """list of training images below root, one "path,label" or "path label" per line; replaces train_dir.
    null: <train_dir>.csv, as `cmtrain data split` writes it, if there is no train_dir"""
    val_list: AnyPath | None = _key(None, "the same for validation; replaces val_dir")
    multi_label: bool = False
    """several classes an image: labels such as cat;dog, or - for none; the loss is binary cross entropy"""
    sampling: str | None = _key(None, pattern="^(balanced|power:(0([.][0-9]+)?|1))$")
    """balanced: an epoch draws all classes equally often; power:0.5: in proportion to the root of their
    images (power:P, 0 to 1); null: each image once"""
    fraction: float = _key(1.0, "share of the training images to use, equal in every class", gt=0, le=1)
    decode: Decode = "auto"
    """place of decoding; mixed: the GPU; mixed_whole: the GPU, by whole images that it cuts; cpu; auto:
    mixed, without a GPU cpu. A start tests the decoder; if it fails, the next of these is used"""
    hw_decoder_load: Fraction | None = None
    """share of JPEGs given to a GPU's JPEG engine with mixed or mixed_whole; null: DALI's default"""
    threads: Count | None = _key(None, "decoding threads of a process; null: its share of the cores")
    prefetch_batches: Count = _key(2, "micro-batches prepared ahead")
    cache_dir: AnyPath | None = _key(None, "folder for indexes and demo images; null: the user's cache")
    max_bad_fraction: Fraction = MAX_BAD_FRACTION
    """share of unreadable files above which a run is refused or ends"""
    image_px: int = _key(160, "side of the training crop and of the evaluation crop", ge=32, multiple_of=16)
    eval_resize_px: Count = _key(184, "evaluation: shorter side before the centre crop")
    interpolation: Interpolation = _key("bicubic", "resampling of training images")
    eval_interpolation: Interpolation = _key("bicubic", "resampling of evaluation images")
    mean: Mean = _key((0.485, 0.456, 0.406), "subtracted from R, G, B in 0..1")
    std: Std = _key((0.229, 0.224, 0.225), "R, G, B are divided by it after that")


class Augment(Section):
    scale: Scale = _key((0.08, 1.0), "share of the image that the crop takes")
    ratio: Pair = _key((0.75, 1.3333333), "width / height of the random crop")
    hflip: Fraction = _key(0.5, "probability of a mirror image")
    color_jitter: NotNegative | None = _key(None, "brightness, contrast, saturation x 1 +- this; null: off")
    rand_augment: str | None = _key(
        None,
        pattern="^(reimpl|3a|ta_wide|dali(-[mn][0-9]+)*|rand(-([mn]|inc)[0-9]+|-(p|mstd)[0-9]+([.][0-9]+)?)*)$",
    )
    """a timm string such as rand-m9-mstd0.5-inc1 (the paper's) or 3a (DeiT III: grey, solarise or blur);
    ta_wide: torchvision's TrivialAugment; reimpl: the re-implementation's; dali-n2-m9: DALI's own suite (2
    operations, bin 9); null: off"""
    extra: str | None = _key(None, pattern="^[A-Za-z_][A-Za-z0-9_]*:[A-Za-z_][A-Za-z0-9_]*$")
    """your function on a training batch, such as my_augment:blur, of a module in run.imports: it gets
    normalised images (B, 3, H, W) and a seed, from which alone it draws, and returns such images; it comes
    before erasing, MixUp and CutMix"""
    repeats: Count = _key(1, "repeated augmentation: views of a sample per epoch (the paper: 3)")


class Mixing(Section):
    mixup: NotNegative = _key(0.0, "alpha of MixUp's Beta distribution; 0: off")
    cutmix: NotNegative = _key(0.0, "alpha of CutMix's Beta distribution; 0: off")
    mixup_prob: Fraction = _key(1.0, "probability that a batch is mixed at all")
    mixup_switch_prob: Fraction = _key(0.5, "probability of CutMix where both are on")
    until_epoch: Count | None = _key(None, "epochs with MixUp and CutMix; null: all")
    smoothing: FractionBelowOne = _key(0.0, "label smoothing: target mass spread over all classes")
    loss: Literal["cross_entropy", "bce", "bce_sum"] = "cross_entropy"
    """bce: binary cross entropy, each class on its own, and the mean over classes; bce_sum: their sum"""
    target_threshold: FractionBelowOne | None = None
    """with bce, a target above this, after smoothing and mixing, is 1, and 0 otherwise; null: off"""
    class_weights: AnyPath | None = None
    """weights of the classes in the loss; auto: inverse to their images, 1 on average; or a file with lines
    of class,weight; null: all 1"""
    reprob: Fraction = _key(0.0, "probability that an image is randomly erased")
    remode: Literal["pixel", "rand", "const"] = "pixel"
    """with what: noise in each pixel; rand: one random colour an image; const: the mean colour"""
    recount: Count = _key(1, "rectangles erased in such an image")


class Distill(Section):
    teacher: Text | None = None
    """a run, or timm's name of a model with weights, such as resnet50.a1_in1k, of the same classes; it sees
    the pixels that the model sees, and what it gives is learned, too; null: no teacher"""
    kind: Literal["soft", "hard"] = _key("soft", "soft: its probabilities; hard: its likeliest class")
    weight: Fraction = _key(0.5, "share of the loss that the teacher gives, the rest is that of the labels")
    temperature: Positive = _key(1.0, "of soft: both models' logits are divided by it")


class Optim(Section):
    opt: Optimizer = "adamw"
    """the optimizer; those of timm, all but adamw and sgd, make the host wait once a step"""
    lr: Positive = _key(..., "peak learning rate for this global batch size; change both in proportion")
    weight_decay: NotNegative = _key(0.05, "weight decay of matrices and convolutions; others have none")
    momentum: FractionBelowOne = _key(0.9, "momentum of sgd, lars, rmsproptf and muon's kind")
    nesterov: bool = _key(True, "Nesterov momentum of sgd")
    betas: Betas | None = None
    """decay rates of the averages; null: the optimizer's own, of adamw 0.9 and 0.999"""
    eps: Positive | None = None
    """added to the denominator; null: the optimizer's own, 1e-8 of adamw, 1e-6 of lamb"""
    layer_decay: float = _key(1.0, "factor on lr from each layer to the one before; 1: none", gt=0, le=1)
    lr_factors: Texts = _key((), 'more factors, by name pattern, as ["head.*=10"]; all that match count')
    clip_grad: Positive | None = _key(None, "what gradients are clipped to; null: off")
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """norm: the L2 norm of all; value: each number; agc: adaptive (arXiv 2102.06171), a unit's norm as a
    share of that of its weights, the classifier left out"""


class ScheduleSection(Section):
    epochs: Count = _key(..., "epochs of warm-up and decay together")
    warmup_epochs: NotNegative = _key(5.0, "linear warm-up, the first part of epochs")
    warmup_lr: NotNegative = _key(1e-06, "learning rate at step 0")
    min_lr: NotNegative = _key(0.0, "learning rate at the end of epochs")
    cooldown_epochs: int = _key(0, "epochs at min_lr, after the decay", ge=0)
    decay: Literal["cosine", "poly", "step", "wsd"] = "cosine"
    """from lr to min_lr; poly: (1 - done) ** power; step: times decay_rate after each decay_epochs; wsd:
    stable, and a straight line in the last decay_epochs"""
    power: Positive = _key(1.0, "of poly; 1: a straight line")
    decay_epochs: Positive = _key(30.0, "epochs of a step, or of the last part of wsd")
    decay_rate: Fraction = _key(0.1, "factor of a step")


class Train(Section):
    global_batch_size: Count = _key(..., "samples of one optimizer step, over all GPUs and accumulation")
    max_batch_per_gpu: Count | Literal["auto"] = 512
    """most samples of one forward pass; larger batches are accumulated; auto: as many as fit into memory. A
    step that runs out of memory is done again in smaller passes, which stay; with auto, that finds them"""
    precision: Literal["auto", "fp16", "bf16", "tf32", "fp32"] = "auto"
    """auto: fp16 on a GPU, fp32 without; fp16 and bf16 are the fastest; tf32 (A100 or newer): fp32 whose
    products and convolutions have ten bits of its 23, for matrix units; fp32: exact, also in convolutions"""
    compile: bool = _key(False, "compile the model with torch.compile")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """mode of torch.compile; the other two replay CUDA graphs, which pays below some 256 images per GPU"""
    grad_checkpointing: bool = False
    """keep only the input of each block for the backward pass and compute the rest again: less memory, about
    a third more arithmetic, the same numbers"""
    log_every_steps: Count = _key(50, "optimizer steps between two log points")
    step_timeout_seconds: Positive | None = 900.0
    """a step, a batch of an evaluation or a checkpoint that takes longer ends the process and leaves its
    stacks in the run folder; the first of each may take three times as long; null: never"""
    collective_timeout_seconds: Positive = _key(600.0, "how long ranks wait for one another")


class Ema(Section):
    decay: float | None = _key(None, "decay per step of the weights' average (EMA); null: off", gt=0, lt=1)
    warmup: bool = _key(False, "a smaller decay at first: 1 - (1 + step) ** (-2/3)")


class Guard(Section):
    enabled: bool = _key(True, "undo what a non-finite step did to weights, statistics and EMA")
    rollback_after_bad_steps: Count = _key(20, "bad steps in a row that take the run back to a good state")
    max_rollbacks: int = _key(3, "rollbacks allowed; one more ends the run with exit code 4", ge=0)
    lr_backoff: float = _key(0.25, "factor on the learning rate after a rollback", gt=0, le=1)
    lr_backoff_epochs: NotNegative | None = _key(None, "epochs until that factor is 1 again; null: it stays")
    spike_sigma: Positive = _key(6.0, "standard deviations above the recent mean that make a step a spike")
    spike_action: Literal["report", "rollback"] = "report"
    """rollback: a spike takes the run back, too, as long as max_rollbacks allows"""


class Checkpoint(Section):
    every_epochs: Count = _key(1, "epochs between two checkpoints; the last step is always saved")
    every_steps: Count | None = _key(None, "optimizer steps between two more checkpoints; null: none")
    keep: Count = _key(3, "newest checkpoints kept, beside the best one and the milestones")
    milestone_every_epochs: Count | None = _key(None, "epochs between checkpoints that are never deleted")


class Evaluate(Section):
    every_epochs: Count = _key(1, "epochs between two evaluations; the last step is always evaluated")
    best: Literal["top1", "balanced", "f1", "loss", "map"] | None = None
    """what makes a checkpoint the best; balanced: mean accuracy of the classes (macro recall); f1: macro F1;
    loss: the lowest; map: mean average precision; null: top1, with data.multi_label map"""


class Metrics(Section):
    enabled: bool = _key(True, "serve Prometheus metrics over HTTP")
    host: str = _key("127.0.0.1", "address to serve at; 0.0.0.0: all", pattern="^[A-Za-z0-9.:_-]+$")
    port: int = _key(9410, "port of local rank 0; local rank r serves at port + r", ge=1, le=65535)
    allowed_hosts: Texts = _key((), 'more names to answer to, as of a service or proxy; ["*"]: all')
    stall_seconds: Positive = _key(600.0, "/-/healthy answers 503 if no step ended for this long")
    trackers: Trackers = _key((), "experiment trackers that get log points and evaluations")


class Expect(Section):
    top1: Fraction | None = _key(None, "accuracy that the run should reach, 0..1")
    tolerance: Fraction = _key(0.01, "how far below top1 still counts as reached")
    diverges: bool = _key(False, "the source reports that its own run did not converge")
    source: Text | None = _key(None, "where that accuracy was published")
    enforce: bool = _key(False, "end with exit code 5 where top1 is not reached")
