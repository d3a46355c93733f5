"""Test the model as timm's users see it: sizes, options, features, checkpoints, precisions, wrappers."""

import contextlib
import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cmtrain.models import load_reference_checkpoint, resize_positions, to_reference_state_dict
from cmtrain.models.blocks import add_branch

NAMES = ["cmt_micro", "cmt_ti", "cmt_xs", "cmt_s", "cmt_b"]
VARIANTS = ["paper", "reimpl"]
REIMPL = {"variant": "reimpl"}
FC = torch.zeros(2, 3, 1, 1)
REFERENCE_OPTIONS = [
    {"variant": "paper"},
    {"variant": "paper", "qkv_bias": False},
    {"variant": "reimpl"},
    {"variant": "reimpl", "attention_bias": "pairwise", "qkv_bias": False},
    {"variant": "reimpl", "attention_bias": "none", "absolute_position": True},
]
OURS = {"attention_bias": "relative", "attention_bias_scope": "block", "absolute_position": True}


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def micro(**options) -> nn.Module:
    return timm.create_model("cmt_micro", **{"num_classes": 10, **options})


def images(px: int = 32, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, px, px)


def set_tables(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".table"):
                parameter.fill_(value)


# ---- sizes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_reach_every_parameter(name, variant):
    model = timm.create_model(name, variant=variant, img_size=32, num_classes=7)
    logits = model(images())
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("cmt_ti", 9_492_426, 0.64),
        ("cmt_xs", 15_247_208, 1.55),
        ("cmt_s", 26_256_160, 4.03),
        ("cmt_b", 45_715_076, 9.32),
    ],
)
def test_parameters_and_multiply_adds_at_the_papers_image_sizes(name, parameters, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        picture = torch.empty(1, 3, model.img_size, model.img_size)
    with FlopCounterMode(display=False) as counter:
        model(picture)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e9, 2) == gmacs


def test_micro_is_small():
    assert sum(p.numel() for p in micro().parameters()) == 311_090


@pytest.mark.parametrize("options", [*REFERENCE_OPTIONS, OURS])
@pytest.mark.parametrize("px", [64, 96, 160])
def test_any_multiple_of_32_works(px, options):
    assert micro(img_size=px, **options)(images(px, 2)).shape == (2, 10)


@pytest.mark.parametrize("img_size", [0, 16, 48, 100, (160, 192), -32])
def test_a_bad_image_size_is_refused(img_size):
    with pytest.raises(ValueError, match="must be a square of a multiple of 32 pixels"):
        micro(img_size=img_size)


def test_an_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match="input is 64x64 px, the model was built for img_size=32"):
        micro()(images(64))


@pytest.mark.parametrize(
    ("option", "legal"),
    [
        ("variant", "'paper', 'reimpl'"),
        ("attention_bias", "'none', 'relative', 'pairwise'"),
        ("attention_bias_scope", "'stage', 'block'"),
        ("global_pool", "'avg', ''"),
    ],
)
def test_a_bad_option_names_the_legal_values(option, legal):
    with pytest.raises(ValueError, match=f"{option}='wrong' is not one of {legal}"):
        micro(**{option: "wrong"})


# ---- options


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["relative", "pairwise"])
@pytest.mark.parametrize("scope", ["stage", "block"])
def test_zero_tables_are_no_tables(variant, kind, scope):
    plain = micro(variant=variant, img_size=64, attention_bias="none").eval()
    model = micro(
        variant=variant, img_size=64, attention_bias=kind, attention_bias_scope=scope, absolute_position=True
    ).eval()
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    x = images(64)
    with torch.no_grad():
        before = plain(x)
        assert (model(x) - before).abs().max() > 1e-6
        set_tables(model, 0.0)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scope_block_with_equal_tables_is_scope_stage(variant):
    options = {"variant": variant, "img_size": 64, "attention_bias": "relative"}
    per_stage = micro(attention_bias_scope="stage", **options).eval()
    per_block = micro(attention_bias_scope="block", **options).eval()
    shared = per_stage.state_dict()
    spread = {
        key: shared[f"stages.{key.split('.')[1]}.bias.table"] if key.endswith("bias.table") else shared[key]
        for key in per_block.state_dict()
    }
    per_block.load_state_dict(spread)
    x = images(64)
    with torch.no_grad():
        assert torch.equal(per_block(x), per_stage(x))


def test_defaults_are_each_variants_own():
    tables = {
        v: {k: tuple(p.shape) for k, p in micro(variant=v).named_parameters() if "table" in k}
        for v in VARIANTS
    }
    assert tables["paper"]["stages.1.bias.table"] == (2, 16, 1)
    assert tables["reimpl"]["stages.1.blocks.0.bias.table"] == (7, 7)
    assert len(tables["paper"]) == 4
    assert len(tables["reimpl"]) == 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_qkv_bias_off_leaves_the_projection_biases_out(variant):
    names = [key for key, _ in micro(variant=variant, qkv_bias=False).named_parameters() if ".attn." in key]
    assert {key.split(".attn.")[1] for key in names if key.endswith(".bias") and "reduce" not in key} == {
        "proj.bias"
    }


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "proj_drop_rate", "drop_path_rate"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_in_training_only(variant, rate):
    model = micro(variant=variant, img_size=64, **{rate: 0.5})
    x = images(64)
    with torch.no_grad():
        first, second = model(x), model(x)
        assert (first - second).abs().max() > 1e-6
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(("variant", "in_the_ffn"), [("paper", 0.3), ("reimpl", 0.0)])
def test_projection_dropout_reaches_the_feed_forward_network_in_the_paper_only(variant, in_the_ffn):
    block = micro(variant=variant, proj_drop_rate=0.3).stages[2].blocks[1]
    assert (block.attn.proj_drop.p, block.ffn.drop.p) == (0.3, in_the_ffn)


def test_without_dropout_training_is_repeatable():
    model, x = micro(), images()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_path_grows_linearly_on_the_branches_the_reference_drops(variant):
    blocks = [b for stage in micro(variant=variant, drop_path_rate=0.2).stages for b in stage.blocks]
    linear = [0.0, 0.05, 0.1, 0.15, 0.2]
    assert all(isinstance(m, DropPath) for b in blocks for m in (b.attn_drop_path, b.ffn_drop_path))
    assert [b.ffn_drop_path.drop_prob for b in blocks] == pytest.approx(linear)
    on_attention = linear if variant == "paper" else [0.0] * 5
    assert [b.attn_drop_path.drop_prob for b in blocks] == pytest.approx(on_attention)


def test_a_branch_is_added_as_timms_drop_path_has_it():
    drop_path = DropPath(0.5)
    results = []
    for add in (lambda x, y: x + drop_path(y), lambda x, y: add_branch(x, y, drop_path)):
        torch.manual_seed(0)
        x, y, dy = torch.randn(3, 8, 4, 5, 6, dtype=torch.float64)
        x.requires_grad_(), y.requires_grad_()
        out = add(x, y)
        out.backward(dy)
        dropped = (y.grad == 0).flatten(1).all(1)
        results.append((out.detach(), x.grad, y.grad))
    assert 0 < dropped.sum() < 8
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    assert torch.equal(add_branch(x, y, drop_path.eval()), x + y)


# ---- timm


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_only(variant):
    model = timm.create_model("cmt_micro", variant=variant, img_size=64, features_only=True)
    features = model(images(64))
    assert [tuple(f.shape) for f in features] == [
        (4, 16, 16, 16),
        (4, 32, 8, 8),
        (4, 64, 4, 4),
        (4, 128, 2, 2),
    ]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [16, 32, 64, 128]
    sum(f.sum() for f in features).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_features_only_keeps_the_stages_it_needs():
    model = timm.create_model("cmt_micro", features_only=True, out_indices=(0, 2))
    assert [f.shape[1] for f in model(images())] == [16, 64]
    assert not any(key.startswith("model.stages.3") for key in model.state_dict())


def test_features_are_the_maps_of_the_whole_model():
    model = micro().eval()
    with torch.no_grad():
        x, features = model.forward_intermediates(images())
        assert torch.equal(features[3], x)
        assert (
            len(model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True))
            == 1
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_head(variant):
    model, x = micro(variant=variant).eval(), images(batch=2)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 1, 1)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pre_logits), model(x))

    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), pre_logits)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.head_hidden_size, 1, 1)
    with pytest.raises(ValueError, match="needs num_classes=0"):
        model.reset_classifier(3)


def test_default_cfg_describes_the_model():
    model = timm.create_model("cmt_xs", num_classes=0)
    cfg = model.default_cfg
    assert cfg["input_size"] == (3, 192, 192)
    assert model.img_size == 192
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert cfg["classifier"] == "head"
    assert micro(in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_weight_decay_spares_the_position_tables_and_they_exist():
    model = micro(absolute_position=True)
    spared = model.no_weight_decay()
    assert spared == {key for key, _ in model.named_parameters() if key.endswith(".table")}
    assert len(spared) == 5


def test_group_matcher_places_every_parameter():
    from timm.models import group_parameters

    model = micro(variant="reimpl", absolute_position=True)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(key for names in groups.values() for key in names) == sorted(
        k for k, _ in model.named_parameters()
    )
    depth = {key: depth for depth, names in groups.items() for key in names}
    assert (
        depth["stem.conv1.weight"] < depth["stages.0.embed.weight"] < depth["stages.3.blocks.0.norm1.weight"]
    )
    assert depth["stages.3.blocks.0.norm1.weight"] < depth["head.weight"]


def test_pretrained_weights_are_refused():
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("cmt_ti", pretrained=True)


# ---- checkpoints


def released(**options) -> dict[str, torch.Tensor]:
    """Return weights in a reference's layout, every tensor different from a new model's."""
    model = micro(img_size=64, **options)
    model(images(64))  # moves the BatchNorm buffers
    return to_reference_state_dict(model)


@pytest.mark.parametrize("options", REFERENCE_OPTIONS)
def test_reference_weights_round_trip_bit_for_bit(options):
    weights = released(**options)
    model = micro(img_size=64, **options)
    load_reference_checkpoint(model, weights)
    again = to_reference_state_dict(model)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_wrapped_and_prefixed_weights_load(wrapper):
    weights = released()
    model = micro(img_size=64)
    load_reference_checkpoint(model, {wrapper: {f"module.{k}": v for k, v in weights.items()}, "epoch": 3})
    assert torch.equal(to_reference_state_dict(model)["stem_conv1.weight"], weights["stem_conv1.weight"])


def test_averaged_weights_are_preferred_where_a_file_has_both():
    plain, averaged = released(), released()
    model = micro(img_size=64)
    load_reference_checkpoint(model, {"model": plain, "model_ema": averaged})
    assert torch.equal(to_reference_state_dict(model)["_fc.weight"], averaged["_fc.weight"])


def test_gradients_can_be_renamed_too():
    model = micro(variant="reimpl", img_size=64)
    model(images(64)).sum().backward()
    gradients = to_reference_state_dict(model, {key: p.grad for key, p in model.named_parameters()})
    weights = to_reference_state_dict(model)
    assert gradients.keys() == {key for key in weights if "running" not in key and "num_batches" not in key}
    assert all(gradients[key].shape == weights[key].shape for key in gradients)


@pytest.mark.parametrize(
    ("made_with", "change", "loaded_into", "message"),
    [
        ({}, {}, REIMPL, r"of variant='paper', the model was built with 'reimpl'"),
        (REIMPL, {}, {}, r"of variant='reimpl', the model was built with 'paper'"),
        ({}, {}, {"qkv_bias": False}, r"qkv_bias=True, the model has qkv_bias=False; unexpected: .*q\.bias"),
        (REIMPL, {}, REIMPL | {"attention_bias": "pairwise"}, "attention_bias='relative', the"),
        (REIMPL, {}, REIMPL | {"absolute_position": True}, "absolute_position=False, the model"),
        ({}, {"_bn.weight": None}, {}, r"missing: _bn\.weight$"),
        ({}, {"other": torch.zeros(1)}, {}, r"unexpected: other$"),
        ({}, {"_fc.weight": FC}, {}, r"wrong shape: _fc.weight \(2, 3, 1, 1\), not \(256, 128, 1, 1\)$"),
        ({}, {"relative_pos_a": torch.zeros(1, 60, 4)}, {}, r"stages.0.bias.table: .*\(1, 60, 4\) cannot"),
        ({"num_classes": 5}, {}, {}, r"wrong shape: head.weight \(5, 256\), not \(10, 256\), head.bias"),
        ({}, {}, {"attention_bias": "relative"}, "other attention biases have no counterpart"),
        ({}, {}, {"absolute_position": True}, "absolute_position has no counterpart"),
        (REIMPL, {}, REIMPL | {"attention_bias_scope": "stage"}, "has no counterpart there"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(made_with, change, loaded_into, message):
    weights = released(**made_with)
    weights = {key: value for key, value in {**weights, **change}.items() if value is not None}
    model = micro(img_size=64, **loaded_into)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_reference_checkpoint(model, weights)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_strange_files_are_named_for_what_they_are():
    with pytest.raises(ValueError, match="cmtrain's own weights"):
        load_reference_checkpoint(micro(), micro().state_dict())
    with pytest.raises(
        ValueError, match=r"neither the paper's nor the re-implementation's .* first keys are conv1\.weight"
    ):
        load_reference_checkpoint(micro(), {"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_head_is_skipped_on_request(variant):
    weights = released(variant=variant, num_classes=5)
    model = micro(variant=variant, img_size=64)
    head = model.head.weight.clone()
    load_reference_checkpoint(model, weights, skip_head=True)
    assert torch.equal(model.head.weight, head)
    ours = to_reference_state_dict(model)
    assert all(
        torch.equal(ours[k], w) for k, w in weights.items() if not k.startswith(("head.", "classifier."))
    )


@pytest.mark.parametrize("options", REFERENCE_OPTIONS)
def test_reference_weights_load_at_another_image_size(options):
    weights = released(**options)
    model = micro(img_size=96, **options)
    load_reference_checkpoint(model, weights)
    ours = to_reference_state_dict(model)
    tables = {key for key in weights if "pos" in key}
    assert len(tables) in (1, 4, 5)
    assert all(ours[key].shape != weights[key].shape for key in tables)
    assert all(torch.equal(ours[key], weights[key]) for key in weights.keys() - tables)
    assert model.eval()(images(96, 2)).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"attention_bias": "relative", "attention_bias_scope": "block"}, {"attention_bias": "none"},
        {"variant": "reimpl", "absolute_position": True},
        {"variant": "reimpl", "attention_bias": "pairwise"},
    ],
)  # fmt: skip
def test_the_input_size_of_a_model_can_be_changed(options):
    """It is then the model that is built at that size and gets the same weights, resampled."""
    model = micro(img_size=64, **options).eval()
    larger = micro(img_size=96, **options).eval()
    larger.load_state_dict(resize_positions(model.state_dict(), larger))
    images = torch.randn(2, 3, 96, 96)
    with pytest.raises(ValueError, match="built for img_size=64"):
        model(images)
    model.set_input_size(96)
    assert torch.allclose(model(images), larger(images), atol=1e-5)
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="multiple of 32"):
        model.set_input_size(100)


def saved_bytes(model, x):
    """Return the bytes that a forward pass keeps for the backward pass, and do both."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    loss.backward()
    return sum(sizes.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "reimpl"}, {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}],
)
def test_blocks_that_are_computed_twice_change_no_number(options):
    """Neither gradients, nor random draws, nor the statistics of BatchNorm, which move once."""
    model = micro(img_size=64, **options)
    twice = copy.deepcopy(model)
    twice.set_grad_checkpointing()
    twice, x, sizes = copy.deepcopy(twice), images(64, batch=8), []
    for each in (model, twice):
        torch.manual_seed(1)
        sizes.append(saved_bytes(each, x))
    assert sizes[1] < 0.5 * sizes[0]
    for mine, other in zip(model.parameters(), twice.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    assert all(
        torch.equal(mine, other) for mine, other in zip(model.buffers(), twice.buffers(), strict=True)
    )
    assert all(norm.num_batches_tracked == 1 for norm in twice.modules() if isinstance(norm, nn.BatchNorm2d))
    loss = twice(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(norm.num_batches_tracked == 2 for norm in twice.modules() if isinstance(norm, nn.BatchNorm2d))
    twice.set_grad_checkpointing(False)
    assert saved_bytes(twice, x) == sizes[0]


def test_our_own_weights_move_between_image_sizes():
    model = micro(img_size=64, attention_bias="relative", absolute_position=True)
    state = model.state_dict()
    larger = micro(img_size=96, attention_bias="relative", absolute_position=True)
    larger.load_state_dict(resize_positions(state, larger))
    same = resize_positions(state, model)
    assert all(same[key] is state[key] for key in state)
    with pytest.raises(
        ValueError, match=r"stages.0.bias.table: a table of shape \(1, 256, 4\) cannot be resized"
    ):
        resize_positions(micro(img_size=64).state_dict(), larger)


# ---- memory, precision, wrappers


def test_batch_norms_are_ordinary():
    norms = [m for m in micro().modules() if "running_mean" in dict(m.named_buffers(recurse=False))]
    assert len(norms) == 3 + 5 * 3 + 4 + 1
    assert all(type(m) is nn.BatchNorm2d for m in norms)


def test_the_memory_format_of_the_input_does_not_matter():
    model, x = micro(img_size=64), images(64)
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    first, second = a(x), b(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(first, second)
    assert a.forward_features(x).is_contiguous(memory_format=torch.channels_last)


class LooksLikeCuda(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func == torch.Tensor.is_cuda.__get__ else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", REFERENCE_OPTIONS)
def test_the_cuda_form_computes_the_same_function(options):
    """Padded heads (46 -> 48) and matrix products for 1x1 convolutions, in float64, with all gradients."""
    model = timm.create_model("cmt_ti", img_size=64, num_classes=3, **options).double()
    x = images(64).double()
    found = []
    for mode in (contextlib.nullcontext(), LooksLikeCuda()):
        model.zero_grad()
        with mode:
            logits = model(x)
        logits.square().sum().backward()
        found.append((logits.detach(), {key: p.grad for key, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


def test_attention_on_cuda_uses_the_backend_that_returns_the_gradient_of_the_bias(monkeypatch):
    from cmtrain.models import blocks

    seen = []

    def watched(q, k, v, attn_mask=None, **keywords):
        seen.append((q.shape[-1], attn_mask.dtype, torch.backends.cuda.cudnn_sdp_enabled()))
        return v.new_zeros(q.shape)

    monkeypatch.setattr(blocks.F, "scaled_dot_product_attention", watched)
    model = timm.create_model("cmt_ti", img_size=32, ffn_kernel="eager")
    with torch.autocast("cpu", torch.bfloat16), LooksLikeCuda():
        model(images())
    assert set(seen) == {(48, torch.bfloat16, False)}
    assert len(seen) == 16


class CountCopies(TorchDispatchMode):
    """Counts the tensors of a batch that are copied into another memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and args[0].shape[0] == 7:
            self.copies += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_become_tokens_and_maps_again_without_a_copy(variant):
    """As on CUDA: a CPU copies small tensors inside its attention's matrix products."""
    model = micro(variant=variant, img_size=64, attention_bias="none").eval()
    x = images(64, batch=7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), LooksLikeCuda(), CountCopies() as counter:
        model(x)
    assert counter.copies == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains_and_keeps_the_residual_stream_narrow(variant, dtype):
    model = micro(variant=variant, img_size=64, absolute_position=True)
    with torch.autocast("cpu", dtype):
        features = model.forward_features(images(64))
        logits = model.forward_head(features)
    assert features.dtype == dtype
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_layer_norm_answers_in_the_dtype_of_the_stream_where_autocast_would_not(monkeypatch):
    """CUDA's autocast widens every layer_norm; ours must run with autocast off and narrow inputs."""
    from cmtrain.models import blocks

    seen = []
    real = torch.nn.functional.layer_norm

    def watched(x, *arguments, **keywords):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype))
        return real(x, *arguments, **keywords)

    monkeypatch.setattr(blocks.F, "layer_norm", watched)
    model = micro(variant="reimpl", img_size=64)
    with torch.autocast("cpu", torch.bfloat16):
        model(images(64))
    assert set(seen) == {(False, torch.bfloat16)}
    assert len(seen) == 5 * 2 + 4


def test_compiled_equals_eager():
    """Compile one graph without a break, which reads the reimpl table and switches autocast off."""
    model, x = micro(variant="reimpl"), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(model)(x)
        logits = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("options", [{}, {"variant": "reimpl"}, OURS])
def test_ddp_finds_every_parameter_and_no_foreign_stride(options):
    """DDP warns, an error here, if a gradient's strides are not its bucket's, and copies from then on."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(
            micro(img_size=64, **options), gradient_as_bucket_view=True
        )
        for _ in range(2):  # an unused parameter fails the second forward
            model(images(64)).sum().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_logits_are_small_and_gradients_flow(variant):
    """A new model's softmax is nearly uniform, yet every stage receives a gradient."""
    model = micro(variant=variant, img_size=64)
    logits = model(images(64, 16))
    assert logits.abs().max() < 1
    nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    assert all(stage.embed.weight.grad.abs().max() > 1e-5 for stage in model.stages)
