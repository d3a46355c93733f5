"""Convert weights between the public CMT implementations and ours, and resize position tables.

The paper's release (huawei-noah/Efficient-AI-Backbones, cmt_pytorch) and the re-implementation
(FlyEgle/CMT-pytorch) name the same layers differently and split the attention's projections differently.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmtrain.models.cmt import CMT, HEADS
from cmtrain.models.position import POSITION_MODULES, AbsolutePosition

# Our module inside a block -> the paper's names, the re-implementation's. Our matrix holds the rows of all.
IN_BLOCK = {
    "lpu": ("proj", "LPU.conv_3x3_dw.conv"), "norm1": ("norm1", "norm1"), "attn.q": ("attn.q", "LMHSA.q"),
    "attn.kv": ("attn.k attn.v", "LMHSA.kv"), "attn.qkv": ("attn.q attn.k attn.v", "LMHSA.q LMHSA.kv"),
    "attn.proj": ("attn.proj", "LMHSA.proj"), "attn.reduce": ("attn.sr.0", "LMHSA.sr"),
    "attn.reduce_norm": ("attn.sr.1", "LMHSA.norm"), "bias": ("", "LMHSA.position_embeeding"),
    "norm2": ("norm2", "norm2"), "ffn.expand": ("mlp.conv1.0", "IRFFN.conv1x1_gelu_bn.conv3x3_gelu_bn.0"),
    "ffn.expand_norm": ("mlp.conv1.2", "IRFFN.conv1x1_gelu_bn.conv3x3_gelu_bn.2"),
    "ffn.depthwise": ("mlp.proj", "IRFFN.conv3x3_dw.conv"),
    "ffn.depthwise_norm": ("mlp.proj_bn", "IRFFN.act.1"),
    "ffn.project": ("mlp.conv2.0", "IRFFN.conv1x1_pw.0"),
    "ffn.project_norm": ("mlp.conv2.1", "IRFFN.conv1x1_pw.1"),
}  # fmt: skip
PAPER_ENDS = {
    **{f"stem.{kind}{i}": f"stem_{kind}{i}" for kind in ("conv", "norm") for i in (1, 2, 3)}, "fc": "_fc",
    "fc_norm": "_bn", "head": "head",
}  # fmt: skip
REIMPL_STEM = ("conv3x3_gelu_bn_downsample", "conv3x3_gelu_bn_list.0", "conv3x3_gelu_bn_list.1")
REIMPL_ENDS = {
    **{f"stem.conv{i}": f"stem.{name}.conv3x3_gelu_bn.0" for i, name in enumerate(REIMPL_STEM, 1)},
    **{f"stem.norm{i}": f"stem.{name}.conv3x3_gelu_bn.2" for i, name in enumerate(REIMPL_STEM, 1)},
    "stages.0.absolute": "absolute_pos_embed", "fc": "fc", "head": "classifier",
}  # fmt: skip
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")


def resize_positions(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return one of our own state_dicts with every position table resampled to `model`'s image size.
    One that fits is passed on untouched. Raises ValueError for a table of another kind.
    """
    resized = dict(state_dict)
    for name, module in model.named_modules():
        key = f"{name}.table"
        is_table = isinstance(module, POSITION_MODULES) and key in resized
        if is_table and resized[key].shape != module.table.shape:
            try:
                resized[key] = module.resized(resized[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    return resized


def to_reference_state_dict(model: CMT, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the model's weights and buffers under the names and shapes of its variant's reference.

    tensors: tensors to rename instead, such as gradients, keyed by our parameter names (all or some).
    Raises ValueError when the model has an option that its reference does not know.
    """
    modules = _reference_modules(model)
    reference: dict[str, Tensor] = {}
    for key, tensor in (model.state_dict() if tensors is None else tensors).items():
        parts = _unpack(model, key, tensor.detach())
        reference.update(zip(_reference_keys(modules, key), parts, strict=True))
    return reference


def load_reference_checkpoint(model: CMT, state_dict: Mapping, *, skip_head: bool = False) -> None:
    """Load weights of the paper's authors or the re-implementation into a model of that variant, in place.

    state_dict: the reference's own keys, also inside one of WRAPPERS (averaged weights are preferred) and
    behind "module." prefixes. skip_head: keep the model's own classifier, for another number of classes.
    Position tables of another image size are resized. Raises ValueError for another variant or with all
    options, keys and shapes that do not fit; the model is then not changed.
    """
    given = unwrap(state_dict)
    if "stem.conv1.weight" in given:
        raise ValueError("these are cmtrain's own weights: use model.load_state_dict(resize_positions(...))")
    if not (variant := variant_of(given)):
        what = f"the first keys are {', '.join(list(given)[:3])}"
        raise ValueError(f"neither the paper's nor the re-implementation's weights; {what}")
    if variant != model.variant:
        what = f"the model was built with {model.variant!r}"
        raise ValueError(f"the checkpoint is of variant={variant!r}, {what}")
    modules, own, expected = _reference_modules(model), model.state_dict(), to_reference_state_dict(model)
    if skip_head:
        head = f"{modules['head'][0]}."
        for tensors in given, expected:
            for key in [key for key in tensors if key.startswith(head)]:
                del tensors[key]

    # Name everything that does not fit. Tables need not: they are resized.
    problems = _option_problems(model, given)
    problems += _listed("missing", [name for name in expected if name not in given])
    problems += _listed("unexpected", [name for name in given if name not in expected])
    tables = {name for key in own if key.endswith(".table") for name in _reference_keys(modules, key)}
    wrong = [
        f"{name} {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and name not in tables and given[name].shape != tensor.shape
    ]
    problems += _listed("wrong shape", wrong)
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))

    converted = {}
    for key in own:
        names = _reference_keys(modules, key)
        if names[0] in expected:  # a skipped head is not
            converted[key] = given[names[0]]
            if not key.endswith(".table"):  # the inverse of _unpack, by where it puts each number
                numbers = torch.arange(own[key].numel(), device="cpu").view(own[key].shape)
                order = torch.cat([part.flatten() for part in _unpack(model, key, numbers)])
                flat = torch.cat([given[name].flatten() for name in names])
                packed = flat.clone().index_copy_(0, order.to(flat.device), flat)
                converted[key] = packed.view(own[key].shape)
    model.load_state_dict(own | resize_positions(converted, model))


def _listed(what: str, items: list[str]) -> list[str]:
    """Return a phrase with the first three of `items` and the number of the others; [] for no items."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return [f"{what}: {', '.join(items[:3])}{more}"] if items else []


def unwrap(state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors in a file of any trainer, averaged ones if there are some, by their plain names."""
    inner = [state_dict[name] for name in WRAPPERS if isinstance(state_dict.get(name), Mapping)]
    tensors = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value
        for key, value in (inner or [state_dict])[0].items()
        if isinstance(value, Tensor)
    }
    return {key: tensor for key, tensor in tensors.items() if key != "n_averaged"}  # torch's AveragedModel


def variant_of(given: Mapping[str, Tensor]) -> str:
    """Return whose names these weights have: `paper`, `reimpl`, or "" for neither."""
    if "stem_conv1.weight" in given:
        return "paper"
    return "reimpl" if f"stem.{REIMPL_STEM[0]}.conv3x3_gelu_bn.0.weight" in given else ""


def _option_problems(model: CMT, given: Mapping[str, Tensor]) -> list[str]:
    """Return a phrase for each option that the checkpoint's keys show and that differs from the model's."""
    stage: Any = model.stages[0]
    ours: dict[str, object] = {"qkv_bias": stage.blocks[0].attn.q.bias is not None}
    has_absolute = isinstance(stage.absolute, AbsolutePosition)
    if model.variant == "paper":
        theirs: dict[str, object] = {"qkv_bias": "blocks_a.0.attn.q.bias" in given}
    else:
        table = given.get("stage1.block_list.0.LMHSA.position_embeeding")
        # A side has 2n - 1 offsets, which is odd, or n * n queries: even, n being a multiple of 8.
        kind = "none" if table is None else "relative" if len(table) % 2 else "pairwise"
        theirs = {"qkv_bias": "stage1.block_list.0.LMHSA.q.bias" in given, "attention_bias": kind}
        theirs |= {"absolute_position": "absolute_pos_embed" in given}
        ours |= {"attention_bias": model.attention_bias, "absolute_position": has_absolute}
    different = [name for name in theirs if theirs[name] != ours[name]]
    return [f"it was made with {k}={theirs[k]!r}, the model has {k}={ours[k]!r}" for k in different]


def _reference_modules(model: CMT) -> dict[str, tuple[str, ...]]:
    """Map our module paths to the reference's (or table keys). Raises ValueError for foreign options."""
    is_paper = model.variant == "paper"
    stages: Any = model.stages
    kind, scope = model.attention_bias, model.attention_bias_scope
    foreign = ""
    if is_paper and (kind, scope) != ("pairwise", "stage"):
        foreign = "the paper's release has pairwise tables per stage: other attention biases have"
    elif is_paper and isinstance(stages[0].absolute, AbsolutePosition):
        foreign = "the paper's release has no absolute position embedding: absolute_position has"
    elif not is_paper and kind != "none" and scope == "stage":
        foreign = "the re-implementation has a table per block: attention_bias_scope='stage' has"
    if foreign:
        raise ValueError(f"{foreign} no counterpart there")

    modules = dict(PAPER_ENDS if is_paper else REIMPL_ENDS)
    for i, stage in enumerate(stages):
        letter = "abcd"[i]
        if is_paper:
            modules[f"stages.{i}.embed"] = f"patch_embed_{letter}.proj"
            modules[f"stages.{i}.norm"] = f"patch_embed_{letter}.norm"
            modules[f"stages.{i}.bias"] = f"relative_pos_{letter}"
        else:
            modules[f"stages.{i}.embed"] = f"pool{i + 1}.patch_aggregation"
        for j in range(len(stage.blocks)):
            block = f"blocks_{letter}.{j}" if is_paper else f"stage{i + 1}.block_list.{j}"
            for ours, (paper, reimpl) in IN_BLOCK.items():
                theirs = (paper if is_paper else reimpl).split()
                modules[f"stages.{i}.blocks.{j}.{ours}"] = " ".join(f"{block}.{name}" for name in theirs)
    return {ours: tuple(theirs.split()) for ours, theirs in modules.items()}


def _reference_keys(modules: Mapping[str, tuple[str, ...]], key: str) -> tuple[str, ...]:
    module, _, leaf = key.rpartition(".")
    return modules[module] if leaf == "table" else tuple(f"{name}.{leaf}" for name in modules[module])


def _unpack(model: CMT, key: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """Convert one of our tensors to the reference's: rows split by projection, convolutions 4-D."""
    # The re-implementation's fc is linear, all else that is a matrix here a 1x1 convolution there.
    in_ffn = key.endswith((".expand.weight", ".project.weight"))
    if in_ffn or (key == "fc.weight" and model.variant == "paper"):
        return (tensor[:, :, None, None],)
    if "kv." not in key:  # of attn.kv or attn.qkv
        return (tensor,)
    parts = tensor.chunk(2 if ".kv." in key else 3)  # (q,) k, v
    if model.variant == "paper":
        return tuple(part.clone() for part in parts)
    # The re-implementation orders its rows by channel, then head, then k or v.
    kv = torch.cat(parts[-2:]).unflatten(0, (2, HEADS[int(key.split(".")[1])], -1))  # of this stage
    return (*(part.clone() for part in parts[:-2]), kv.transpose(0, 2).flatten(0, 2))
