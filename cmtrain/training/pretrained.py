"""Load the weights that timm or a model hub has for a model, and take over how its images are prepared."""

import math
from collections.abc import Callable
from typing import Any, get_args

import timm
from huggingface_hub import hf_hub_url, utils
from timm.models import PretrainedCfg, load_model_config_from_hf
from torch import nn

from cmtrain.config.schema import CMT_OPTIONS, Config, Model, prepared_as
from cmtrain.errors import ConfigError
from pipelines.spec import DataError, Interpolation


def load_pretrained(
    config: Config, num_classes: int, make: Callable[..., nn.Module]
) -> tuple[nn.Module, Config, str]:
    """Return the model with its pretrained weights, `config` with their data.*, and a line for the user.
    `make`: makes the model with more arguments of timm.create_model, and has made it without them. Raises
    ConfigError: there are no such weights. DataError: they cannot be fetched.
    """
    utils.logging.set_verbosity_error()  # the hub would print a line for each attempt
    cfg, name = find_pretrained(config.model)
    try:
        model = make(pretrained=True, pretrained_cfg=cfg)
    except Exception as error:  # each source has its own
        raise _unreachable(name, cfg, error) from error
    resize = math.floor(config.data.image_px / cfg.crop_pct)
    theirs: dict[str, Any] = {"mean": cfg.mean, "std": cfg.std, "eval_resize_px": resize}
    if cfg.interpolation in get_args(Interpolation):
        theirs |= {"interpolation": cfg.interpolation, "eval_interpolation": cfg.interpolation}
    stated = config.data.model_fields_set
    line = ", ".join([name, *(f"data.{key} {theirs[key]}" for key in theirs if key not in stated)])
    if num_classes != cfg.num_classes:
        line += f"; new classifier head: {num_classes} classes (the weights have {cfg.num_classes})"
    return model, prepared_as(config, theirs), f"model.pretrained: {line}"


def find_pretrained(model: Model) -> tuple[PretrainedCfg, str]:
    """Return timm's or the hub's description of the weights, and their name. Raises as load_pretrained."""
    given, architecture = str(model.pretrained), model.name.partition(".")[0]
    if given.startswith("hf-hub:"):
        repository = given.removeprefix("hf-hub:")
        try:
            found, name, arguments = load_model_config_from_hf(repository)
        except utils.HFValidationError as error:
            raise ConfigError(f"model.pretrained: {given}: {error}".partition("\n")[0]) from error
        except Exception as error:
            raise _unreachable(given, PretrainedCfg(hf_hub_id=repository), error) from error
        own = model.model_dump(include={*CMT_OPTIONS} - {"ffn_kernel"}) | {"name": architecture}
        for key, value in ({"name": name} | arguments).items():
            if key in own and own[key] != value:
                raise ConfigError(f"model.{key}: {own[key]}, but {given} has {value}")
        return PretrainedCfg(**found), given
    name = model.name if model.pretrained is True else f"{model.name}.{given}"
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    cfg = timm.get_pretrained_cfg(name) if name.partition(".")[2] in ("", *tags) else None
    if cfg is None or not cfg.has_weights:
        raise ConfigError(f"model.pretrained: no weights {name}; timm has {', '.join(tags) or 'none'}")
    return cfg, f"{architecture}.{cfg.tag}"


def _unreachable(name: str, cfg: PretrainedCfg, error: Exception) -> DataError:
    """Return what to download to where, in one line; `error`: why it could not be fetched."""
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    file = cfg.hf_hub_filename or "model.safetensors"
    url = hf_hub_url(repository, file, revision=revision or None) if repository else cfg.url
    advice = f"download {url} elsewhere, and set model.init_from to that file instead" if url else cfg.file
    why = str(error.__cause__ or error).partition("\n")[0]
    return DataError(f"model.pretrained: {name} cannot be loaded; {advice} ({why})")
