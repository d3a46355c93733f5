"""Command-line arguments of a verb: its own options, and overrides of the configuration. Mistakes are one line."""

import argparse
import difflib
import re
from collections.abc import Sequence

from cmtrain.config.load import Overrides, Resolved, load_config
from cmtrain.errors import ConfigError


def load(verb: str, path: str | None, overrides: Overrides) -> Resolved:
    if path is None:
        raise ConfigError(
            f"cmtrain {verb}: --config is missing, e.g. cmtrain {verb} --config configs/demo.yaml"
        )
    return load_config(path, overrides)


def make_parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"cmtrain {verb}",
        description=description,
        epilog="--SECTION.KEY VALUE overrides one value of the configuration; `cmtrain config schema` lists them all.",
        allow_abbrev=False,
        exit_on_error=False,
    )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """The options of a verb, and whatever else looks like an option as an override: load_config knows what is right.

    Raises:
        ConfigError: in one line, what is wrong with the verb's own options.
    """
    overrides: Overrides = []
    own, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if re.match(
            r"--[^=]*[.]", argument
        ):  # taken out first, or argparse takes the values for positional arguments
            overrides.append(_override(argument, rest))
        else:
            own.append(argument)
    try:
        options, rest = parser.parse_known_args(own)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from error
    while rest:
        argument = rest.pop(0)
        name = argument.partition("=")[0]
        if not name.startswith("--"):
            raise ConfigError(f"{parser.prog}: unexpected argument {name}")
        names = [option.replace("_", "-") for option in vars(options)]
        if close := did_you_mean(name.strip("-"), names, "--"):
            raise ConfigError(f"{name}: unknown option{close}")
        overrides.append(_override(argument, rest))
    return options, overrides


def _override(argument: str, rest: list[str]) -> tuple[str, str]:
    """`--key=value`, or `--key` and the value that is the first of `rest`, which is taken out of there."""
    name, equals, value = argument.partition("=")
    if not equals and (not rest or rest[0].startswith("--")):
        raise ConfigError(f"{name}: needs a value")
    return name.removeprefix("--"), value if equals else rest.pop(0)


def parse_alone(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a verb that has no configuration, and so no overrides."""
    options, overrides = parse(parser, arguments)
    if overrides:
        raise ConfigError(f"--{overrides[0][0]}: unknown option; see {parser.prog} --help")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text}")
    return int(text)


def did_you_mean(given: str, choices: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(given, choices, n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""
