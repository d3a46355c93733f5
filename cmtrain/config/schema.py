"""The configuration of a run: these models are the schema, and every field says its unit.

Names follow timm where timm has a name. Values are strict: "512" is not a number and `yes` is not true.
Files, overrides and error messages with line numbers are config_file.py's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cmtrain.config.strict_yaml import emit
from pipelines.spec import MAX_BAD_FRACTION


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be text of at least one character, without control characters")
    return text


# What Linux allows a name, and a quarter of what it allows a path: paths are joined, and files come below.
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1024


def _path(text: str) -> str:
    _printable(text)
    if len(text.encode()) > MAX_PATH_BYTES or any(
        len(part.encode()) > MAX_NAME_BYTES for part in text.split("/")
    ):
        raise ValueError(
            f"must be a path of at most {MAX_PATH_BYTES} bytes, and {MAX_NAME_BYTES} between two slashes"
        )
    return text


def _below_root(text: str) -> str:
    if text.startswith("/") or ".." in text.split("/"):
        raise ValueError("must be below data.root: not absolute, and without ..")
    return _path(text)


Text = Annotated[str, AfterValidator(_printable)]
AnyPath = Annotated[str, AfterValidator(_path)]
PathBelowRoot = Annotated[str, AfterValidator(_below_root)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Interpolation = Literal["bicubic", "bilinear"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


def _tuple(default: tuple[float, ...], description: str) -> Any:
    # The one thing not taken strictly: a list is as good as a tuple.
    return Field(default=default, strict=False, description=description)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(_Section):
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$",
        description="name of the run and of its folder below run.dir; null: the configuration file's name",
    )
    dir: AnyPath = Field(
        default="runs", description="folder that holds the run folders; on several nodes, one that all share"
    )
    seed: int = Field(
        default=42,
        ge=0,
        le=2**31 - 1,
        description="of the initial weights, sample order and every random draw",
    )


class Model(_Section):
    name: str = Field(
        default="cmt_ti",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$",
        description="of any model that timm can create",
    )
    variant: Literal["paper", "reimpl"] = Field(
        default="paper",
        description="paper: the official architecture (arXiv 2107.06263 v2); reimpl: the re-implementation's",
    )
    num_classes: Count | None = Field(
        default=None, description="outputs of the classifier; null: as many as the data has"
    )
    attention_bias: Literal["none", "relative", "pairwise"] | None = Field(
        default=None,
        description="position bias of attention, by offset or by (query, key) pair; null: the variant's own",
    )
    attention_bias_scope: Literal["stage", "block"] | None = Field(
        default=None, description="one bias table for a stage or for every block; null: the variant's own"
    )
    absolute_position: bool = Field(
        default=False, description="add a learned position embedding (the re-implementation's ape)"
    )
    absolute_position_px: int | None = Field(
        default=None,
        ge=4,
        multiple_of=4,
        description="image side that its table is made for; null: data.image_px",
    )
    qkv_bias: bool = Field(default=True, description="bias in the query, key and value projections")
    drop_rate: FractionBelowOne = Field(default=0.0, description="dropout probability before the classifier")
    attn_drop_rate: FractionBelowOne = Field(
        default=0.0, description="dropout probability of attention weights"
    )
    proj_drop_rate: FractionBelowOne = Field(
        default=0.0, description="dropout probability after the projections of a block"
    )
    drop_path_rate: FractionBelowOne = Field(
        default=0.0, description="stochastic depth: probability at the last block"
    )
    ffn_kernel: Literal["auto", "fused", "eager"] = Field(
        default="auto",
        description="feed-forward networks and perception units in Triton kernels or operation by operation; auto: "
        "fused where a GPU can",
    )
    init_from: AnyPath | None = Field(
        default=None,
        description="run, checkpoint, export folder or .safetensors file to start from, of any image size and number "
        "of classes; null: new weights",
    )


# The fields of Model that other models than CMT do not have.
CMT_OPTIONS = (
    "variant", "attention_bias", "attention_bias_scope", "absolute_position", "absolute_position_px", "qkv_bias",
    "attn_drop_rate", "proj_drop_rate", "ffn_kernel",
)  # fmt: skip


class Data(_Section):
    root: AnyPath = Field(description="folder that holds the images, or demo:digits or demo:photos")
    train_dir: PathBelowRoot = Field(
        default="train", description="<class>/<image> tree of the training images, below root"
    )
    val_dir: PathBelowRoot = Field(
        default="val", description="<class>/<image> tree of the validation images, below root"
    )
    train_list: PathBelowRoot | None = Field(
        default=None,
        description='file with one "path,label" or "path label" a line, used instead of train_dir; all below root',
    )
    val_list: PathBelowRoot | None = Field(
        default=None, description="the same for validation, used instead of val_dir"
    )
    fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of the training images to use, equal in every class"
    )
    decode: Literal["auto", "mixed", "cpu"] = Field(
        default="auto",
        description="where JPEGs are decoded; mixed: on the GPU; auto: mixed where there is a GPU",
    )
    hw_decoder_load: Fraction | None = Field(
        default=None,
        description="share of JPEGs given to a GPU's JPEG engine with decode: mixed; null: DALI's default",
    )
    threads: Count | None = Field(
        default=None, description="decoding threads of a process; null: its share of the cores"
    )
    prefetch_batches: Count = Field(default=2, description="micro-batches prepared ahead")
    cache_dir: AnyPath | None = Field(
        default=None, description="folder for indexes and demo images; null: the user's cache"
    )
    max_bad_fraction: Fraction = Field(
        default=MAX_BAD_FRACTION,
        description="share of unreadable files above which a run is refused, or ended if they turn up during it",
    )
    image_px: int = Field(
        default=160,
        ge=32,
        multiple_of=32,
        description="side of the training crop and of the evaluation crop",
    )
    eval_resize_px: Count = Field(default=184, description="evaluation: shorter side before the centre crop")
    interpolation: Interpolation = Field(default="bicubic", description="resampling of training images")
    eval_interpolation: Interpolation = Field(
        default="bicubic", description="resampling of evaluation images"
    )
    mean: tuple[float, float, float] = _tuple(
        (0.485, 0.456, 0.406), "subtracted from R, G, B in 0..1; ImageNet's"
    )
    std: tuple[Positive, Positive, Positive] = _tuple(
        (0.229, 0.224, 0.225), "divides R, G, B after that; ImageNet's"
    )


class Augment(_Section):
    scale: tuple[Positive, Fraction] = _tuple(
        (0.08, 1.0), "area of the random crop, as a share of the image"
    )
    ratio: tuple[Positive, Positive] = _tuple((0.75, 1.3333333), "width / height of the random crop")
    hflip: Fraction = Field(default=0.5, description="probability of a mirror image")
    color_jitter: NotNegative | None = Field(
        default=None,
        description="brightness, contrast and saturation are each multiplied by 1 +- this; null: off",
    )
    rand_augment: str | None = Field(
        default=None,
        pattern=r"^(reimpl|3a|dali(-[mn][0-9]+)*|rand(-([mn]|inc)[0-9]+|-(p|mstd)[0-9]+([.][0-9]+)?)*)$",
        description="a timm string such as rand-m9-mstd0.5-inc1 (the paper's) or 3a (DeiT III's grey, solarise or "
        "blur), reimpl (the re-implementation's), or DALI's own suite as dali-n2-m9 (operations, bin); null: off",
    )
    repeats: Count = Field(
        default=1, description="repeated augmentation: views of a sample in an epoch (the paper: 3)"
    )


class Mixing(_Section):
    mixup: NotNegative = Field(default=0.0, description="alpha of MixUp's Beta distribution; 0: off")
    cutmix: NotNegative = Field(default=0.0, description="alpha of CutMix's Beta distribution; 0: off")
    mixup_prob: Fraction = Field(default=1.0, description="probability that a batch is mixed at all")
    mixup_switch_prob: Fraction = Field(default=0.5, description="probability of CutMix where both are on")
    smoothing: FractionBelowOne = Field(
        default=0.0, description="label smoothing: target mass spread over all classes"
    )
    reprob: Fraction = Field(
        default=0.0, description="probability that an image is randomly erased (pixel noise)"
    )
    recount: Count = Field(default=1, description="rectangles erased in such an image")


class Optim(_Section):
    opt: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimizer")
    lr: Positive = Field(
        description="peak learning rate, for the global batch size as it is; nothing rescales it"
    )
    weight_decay: NotNegative = Field(
        default=0.05, description="of matrices and convolutions; vectors and tables have none"
    )
    momentum: FractionBelowOne = Field(default=0.9, description="sgd only")
    nesterov: bool = Field(default=True, description="sgd only")
    betas: tuple[FractionBelowOne, FractionBelowOne] = _tuple((0.9, 0.999), "adamw only")
    eps: Positive = Field(default=1e-8, description="adamw only")
    clip_grad: Positive | None = Field(
        default=None, description="L2 norm that gradients are clipped to; null: off"
    )


class ScheduleSection(_Section):
    epochs: Count = Field(description="warm-up and cosine together")
    warmup_epochs: NotNegative = Field(default=5.0, description="linear warm-up, the first part of epochs")
    warmup_lr: NotNegative = Field(default=1e-6, description="learning rate at step 0")
    min_lr: NotNegative = Field(default=0.0, description="learning rate at the end of epochs")
    cooldown_epochs: int = Field(default=0, ge=0, description="epochs at min_lr, after the cosine")


class Train(_Section):
    global_batch_size: Count = Field(
        description="samples of one optimizer step, over all GPUs and accumulation"
    )
    max_batch_per_gpu: Count = Field(
        default=512, description="most samples of one forward pass; more are accumulated"
    )
    precision: Literal["auto", "fp16", "bf16", "fp32"] = Field(
        default="auto", description="auto: fp16 on a GPU, fp32 without"
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        default="default",
        description="of torch.compile; the other two replay CUDA graphs, which pays below some 256 images a GPU",
    )
    log_every_steps: Count = Field(default=50, description="optimizer steps between two log points")
    step_timeout_seconds: Positive | None = Field(
        default=900.0,
        description="a step, a batch of an evaluation or a checkpoint that takes longer ends the process with its "
        "stacks in the run folder; the first of each may take three times as long; null: never",
    )
    collective_timeout_seconds: Positive = Field(
        default=600.0, description="how long ranks wait for one another in a collective operation"
    )


class Ema(_Section):
    decay: float | None = Field(
        default=None, gt=0, lt=1, description="of the weights' moving average, a step; null: off"
    )


class Guard(_Section):
    enabled: bool = Field(
        default=True, description="undo what a non-finite step did to weights, statistics and EMA"
    )
    rollback_after_bad_steps: Count = Field(
        default=20,
        description="that many bad steps in a row put the run back to a good state kept in memory",
    )
    max_rollbacks: int = Field(default=3, ge=0, description="one more ends the run with exit code 4")
    lr_backoff: float = Field(
        default=0.25, gt=0, le=1, description="factor on the learning rate after a rollback"
    )
    lr_backoff_epochs: NotNegative | None = Field(
        default=None, description="epochs over which that factor comes back to 1, evenly; null: it stays"
    )
    spike_sigma: Positive = Field(
        default=6.0,
        description="standard deviations above the mean of the last steps that make a loss or gradient norm a spike",
    )
    spike_action: Literal["report", "rollback"] = Field(
        default="report", description="rollback: go back on a spike, too, as long as max_rollbacks allows"
    )


class Checkpoint(_Section):
    every_epochs: Count = Field(
        default=1, description="epochs between two checkpoints; the last step is always saved"
    )
    every_steps: Count | None = Field(
        default=None, description="optimizer steps between two more checkpoints; null: none"
    )
    keep: Count = Field(
        default=3, description="newest checkpoints kept, beside the best one and the milestones"
    )
    milestone_every_epochs: Count | None = Field(
        default=None, description="epochs between two checkpoints that are kept for ever; null: none"
    )


class Evaluate(_Section):
    every_epochs: Count = Field(
        default=1, description="epochs between two evaluations; the last step is always evaluated"
    )


class Metrics(_Section):
    enabled: bool = Field(default=True, description="serve Prometheus metrics over HTTP")
    host: str = Field(
        default="127.0.0.1", pattern=r"^[A-Za-z0-9.:_-]+$", description="address to serve at; 0.0.0.0: all"
    )
    port: int = Field(
        default=9410, ge=1, le=65535, description="port of local rank 0; local rank r serves at port + r"
    )
    stall_seconds: Positive = Field(
        default=600.0, description="/-/healthy answers 503 when training has finished no step for that long"
    )
    trackers: tuple[Tracker, ...] = _tuple(
        (), "experiment trackers that get the log points and evaluations, too"
    )


class Expect(_Section):
    top1: Fraction | None = Field(default=None, description="accuracy that the run should reach, 0..1")
    tolerance: Fraction = Field(default=0.01, description="how far below top1 still counts as reached")
    diverges: bool = Field(default=False, description="the source reports that its own run did not converge")
    source: Text | None = Field(default=None, description="where that comes from")
    enforce: bool = Field(default=False, description="end with exit code 5 where top1 is not reached")


class Config(_Section):
    run: Run = Run()
    model: Model = Model()
    data: Data
    augment: Augment = Augment()
    mixing: Mixing = Mixing()
    optim: Optim
    schedule: ScheduleSection
    train: Train
    ema: Ema = Ema()
    guard: Guard = Guard()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    metrics: Metrics = Metrics()
    expect: Expect = Expect()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if found := contradictions(dict(flat(self))):
            raise ValueError("; ".join(message for _, message in found))
        return self


def flat(config: Config) -> Iterator[tuple[str, Any]]:
    """("section.key", value) of every field, in the order of the schema."""
    for section, fields in config:
        for key, value in fields:
            yield f"{section}.{key}", value


# (keys, what must hold for their values, how to say it): the rules that no single field can check.
_RULES: tuple[tuple[tuple[str, ...], Callable[..., bool], str], ...] = (
    (("augment.scale",), lambda scale: scale[0] <= scale[1], "{} must go from low to high"),
    (("augment.ratio",), lambda ratio: ratio[0] <= ratio[1], "{} must go from low to high"),
    (
        ("data.eval_resize_px", "data.image_px"),
        lambda resize, crop: resize >= crop,
        "{} must not be less than {}",
    ),
    (
        ("schedule.warmup_epochs", "schedule.epochs"),
        lambda warmup, epochs: warmup < epochs,
        "{} must be less than {}",
    ),
    (("schedule.min_lr", "optim.lr"), lambda low, peak: low <= peak, "{} must not exceed {}"),
    (
        ("schedule.warmup_lr", "optim.lr", "schedule.warmup_epochs"),
        lambda first, peak, warmup: first <= peak or warmup == 0,
        "{} must not exceed {}",
    ),
    (
        ("optim.nesterov", "optim.momentum", "optim.opt"),
        lambda nesterov, momentum, opt: momentum > 0 or not nesterov or opt != "sgd",
        "{} needs {} to be greater than 0",
    ),
    (
        ("train.compile_mode", "train.compile"),
        lambda mode, on: on or mode == "default",
        "{} needs {} to be true",
    ),
    (
        ("expect.enforce", "expect.top1"),
        lambda enforce, top1: top1 is not None or not enforce,
        "{} needs {} to be set",
    ),
    (
        ("expect.diverges", "expect.top1"),
        lambda diverges, top1: top1 is None or not diverges,
        "{} contradicts {}",
    ),
    (
        ("model.absolute_position_px", "model.absolute_position"),
        lambda px, is_there: px is None or is_there,
        "{} needs {} to be true",
    ),
    *(
        (
            (f"model.{key}", "model.name"),
            lambda value, name, own=Model.model_fields[key].default: name.startswith("cmt_") or value == own,
            "{} is an option of CMT only, and does not fit {}",
        )
        for key in CMT_OPTIONS
    ),
)


def contradictions(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """(keys, message) of each rule that `values`, by dotted key, break. A rule needs all of its keys to be there."""
    found = []
    for keys, holds, message in _RULES:
        if all(key in values for key in keys) and not holds(*(values[key] for key in keys)):
            found.append((keys, message.format(*(f"{key} ({emit(values[key])})" for key in keys))))
    return found


def to_yaml(config: Config, comments: Mapping[str, str] | None = None) -> str:
    """`config` as a file that load_config reads back as an equal one. `comments`: by dotted key, put after values."""
    lines: list[tuple[str, str]] = []
    for section, fields in config:
        lines.append((f"{section}:", ""))
        for key, value in fields:
            lines.append((f"  {key}: {emit(value)}", (comments or {}).get(f"{section}.{key}", "")))
    width = max(len(text) for text, _ in lines)
    return "".join(f"{text:<{width}}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)
