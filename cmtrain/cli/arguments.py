"""Parse the arguments of a verb: its own options, and overrides of the configuration."""

import os
import re
import sys
from argparse import ArgumentError, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from cmtrain.config.load import Overrides, Resolved, load_config
from cmtrain.errors import ConfigError, did_you_mean

Verb = Callable[[list[str]], int | None]  # runs the arguments of a verb; returns the exit code, None for 0

EMPTY = "is empty: a variable of the shell that is not set?"
# Records of runs, configurations, weights, data
KEPT = ("status.json", ".jsonl", ".yaml", ".yml", ".pth", ".safetensors", ".tar", ".npz", ".jpg", ".jpeg")


class Parser(ArgumentParser):
    """Parses the arguments of `cmtrain VERB`: its own options, and overrides of the configuration."""

    def __init__(self, verb: str, description: str) -> None:
        more = "--SECTION.KEY VALUE overrides a value of the configuration; see `cmtrain config reference`."
        how: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
        super().__init__(f"cmtrain {verb}", description=description, epilog=more, **how)

    def error(self, message: str) -> NoReturn:  # of arguments that are missing; argparse prints the usage
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")

    def add_json(self, *, to_file: bool = False) -> None:
        """Add --json, for a verb that prints its result for programs only where stdout is no terminal."""
        if to_file:
            what = "print the figures as JSON on a terminal, too; or write them to FILE"
            self.add_argument("--json", nargs="?", const="", type=out_file, metavar="FILE", help=what)
        else:
            self.add_argument("--json", action="store_true", help="print the JSON line on a terminal, too")

    def parse(self, arguments: Sequence[str]) -> tuple[Namespace, Overrides]:
        """Return the verb's options, and as overrides what else looks like one. Raises ConfigError."""
        overrides: list[tuple[str, str]] = []
        own, rest = list[str](), list(arguments)
        known = ["", "help", *re.findall(r"--([\w-]+)", self.format_usage())]  # "": of -- alone
        while rest:  # overrides first, or argparse takes their values for positional arguments
            argument = rest.pop(0)
            is_value = own and re.fullmatch(r"--[^=]+", own[-1])
            if not argument.strip() and not is_value:
                raise ConfigError(f"an argument {EMPTY}")
            is_option = argument.startswith("--")
            name, equals, value = argument.removeprefix("--").partition("=")
            if re.match(r"~[\w.-]*/", value if is_option else argument):
                advice = "write the whole path; after a blank, and not after =, a shell expands it"
                raise ConfigError(f"{argument}: no shell expanded the ~: {advice}")
            if not is_option or name in known:
                own.append(argument)
            elif "." not in name and (close := did_you_mean(name, known, "--")):
                raise ConfigError(f"--{name}: unknown option{close}")
            elif not equals and (not rest or rest[0].startswith("--")):
                raise ConfigError(f"--{name}: needs a value")
            else:
                overrides.append((name, value if equals else rest.pop(0)))
        try:
            options, rest = self.parse_known_intermixed_args(own)
        except (ArgumentError, ConfigError) as error:
            if taken := [name for name, _ in overrides if "." not in name]:  # perhaps with what is missing
                raise ConfigError(f"--{taken[0]}: unknown option; see {self.prog} --help") from error
            raise ConfigError(str(error).removeprefix("argument ")) from error
        if rest:
            raise ConfigError(f"{self.prog}: unexpected argument {rest[0]}")
        values = [(key.replace("_", "-"), value) for key, value in vars(options).items() if key != "json"]
        for name, value in [*values, *overrides]:  # --json without FILE is ""
            if isinstance(value, str) and not value.strip():
                raise ConfigError(f"--{name}: {EMPTY}")
        return options, overrides

    def parse_with_config(self, arguments: Sequence[str], default: str = "") -> tuple[Namespace, Resolved]:
        """Return the options of a verb, --config among them, and the configuration with its overrides."""
        beside = f" (default: {default})" if default else ""
        what = f"configuration file, or one that ships with cmtrain{beside}"
        self.add_argument("--config", default=default or None, metavar="FILE", help=what)
        options, overrides = self.parse(arguments)
        if [argument.partition("=")[0] for argument in arguments].count("--config") > 1:
            raise ConfigError("--config: given twice; a file takes the values of another by `extends: FILE`")
        if options.config is None:
            example = f"{self.prog} --config configs/demo.yaml"
            raise ConfigError(f"{self.prog}: --config is missing, e.g. {example}")
        return options, load_config(options.config, overrides)

    def parse_alone(self, arguments: Sequence[str]) -> Namespace:
        """Return the options of a verb that has no configuration, and so no overrides."""
        options, overrides = self.parse(arguments)
        if overrides:
            raise ConfigError(f"--{overrides[0][0]}: unknown option; see {self.prog} --help")
        return options


def run_group(group: str, verbs: Mapping[str, Verb], arguments: list[str]) -> int | None:
    """Run that verb of a `group`, such as data, that `arguments` begin with. Returns the exit code."""
    what = arguments.pop(0) if arguments else ""
    if what in ("-h", "--help"):
        sys.stdout.write(help_page(group))
        return None
    if what not in verbs:
        hint = did_you_mean(what, verbs) or f"; there are {', '.join(verbs)}"
        raise ConfigError(f"{' '.join(filter(None, ('cmtrain', group, what)))}: unknown verb{hint}")
    return verbs[what](arguments)


def help_page(name: str) -> str:
    """Return the help of a group of verbs or of the whole program ("help"), or the form of a "plan"."""
    return Path(__file__).with_name(f"{name}.txt").read_text()


def positive(text: str, least: int = 1, most: int = 999_999_999) -> int:
    if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        limit = f" and <= {most}" if most < 999_999_999 or len(text) > 9 else ""
        raise ArgumentTypeError(f"must be a whole number >= {least}{limit}, got {text}")
    return int(text)


count = partial(positive, least=0)


def out_file(text: str) -> str:
    """Refuse what cannot be written to, before hours of work, and what it would be a loss to replace."""
    if os.path.isdir(text) or not os.path.isdir(os.path.dirname(text) or "."):
        raise ArgumentTypeError(f"{text}: must be a file, in a folder that exists")
    if os.path.isfile(text) and text.lower().endswith(KEPT):
        raise ArgumentTypeError(f"{text}: exists, and is no result to replace; give another name")
    return text


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"must be a share 0..1, got {text}")
    return value
