"""Run the command line. Each verb imports what it needs: help and mistakes answer without torch."""

import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cmtrain import __version__, errors
from cmtrain.cli import start
from cmtrain.cli.arguments import Parser, Verb, count, help_page, out_file, positive, run_group
from cmtrain.cli.data_verbs import DATA_VERBS
from cmtrain.cli.model_verbs import MODEL_VERBS
from cmtrain.commands import sweep
from cmtrain.config import describe, load
from cmtrain.config.schema import Config, to_yaml
from cmtrain.monitoring.units import workers
from cmtrain.processes import environment, output, rank
from cmtrain.processes.gpus import visible_gpus
from cmtrain.processes.launcher import run_ranks
from cmtrain.storage.run_folder import REPORT_NAME, RUNS, WEIGHTS_SUFFIXES, read_finished, read_status
from pipelines.spec import DataError, print_lines

DEMO = "configs/demo.yaml"
DEMO_PHOTOS = [
    ("data.root", "demo:photos"), ("data.image_px", "64"), ("data.eval_resize_px", "72"),
    ("augment.hflip", "0.5"), ("expect.top1", "0.85"),
]  # fmt: skip
PREDICTED = ("h100", "h200", "a100", "l40s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; `argv` without its name. Returns the exit code.
    A stdout that fails ends the verbs whose result it is, and never a run.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = (arguments or [""])[0]
    trains = verb in ("train", "demo") or verb.startswith("-")
    is_asked = verb in ("-h", "--help", "--version", "help") or "--dry-run" in arguments
    return output.with_guarded_output(lambda: _main(arguments), stdout_raises=is_asked or not trains)


def _main(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(help_page("help"))
        return errors.EXIT_CONFIG
    if arguments[0] == "help":  # `cmtrain help VERB` is `cmtrain VERB --help`
        arguments = [*arguments[1:], "--help"]
    if arguments[0] in ("-h", "--help", "--version"):
        sys.stdout.write(f"cmtrain {__version__}\n" if arguments[0] == "--version" else help_page("help"))
        return errors.EXIT_DONE
    verb = "train" if arguments[0].startswith("-") else arguments.pop(0)
    try:
        if verb not in _VERBS:
            hint = f" (verbs: {', '.join(_VERBS)}; a configuration file goes after --config)"
            raise errors.ConfigError(f"{verb}: unknown verb{errors.did_you_mean(verb, _VERBS) or hint}")
        if verb not in _READERS and not {"--help", "-h", "--dry-run"} & set(arguments):
            environment.ignore_variables()
            environment.check_launcher()
        if verb in ("eval", "predict", "replay", "diff", "verify", "repair-bn") and _world_size() > 1:
            raise errors.ConfigError(f"cmtrain {verb}: runs in one process, without a launcher")
        return _VERBS[verb](arguments) or errors.EXIT_DONE
    except errors.ConfigError as error:
        rank.hold_back()
        sys.stderr.write(f"{errors.message_of(error)}\n")
        return errors.EXIT_CONFIG
    except DataError as error:
        sys.stderr.write(f"{errors.message_of(error)}\n")
        return errors.EXIT_DATA
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        return errors.EXIT_INTERRUPTED


def _train(arguments: list[str]) -> int:
    parser = Parser("train", "Train a configuration.")
    add = parser.add_argument
    add("--resume", default="auto", metavar="WHAT", help="auto (default), never, force, or a path")
    add("--max-steps", type=positive, metavar="N", help="stop after N optimizer steps")
    add("--nproc", type=positive, metavar="N", help="processes to train in (default: one per GPU)")
    add("--max-restarts", type=count, default=0, metavar="N", help="restarts after failures (0)")
    add("--dry-run", action="store_true", help="print the plan of the run and stop")
    parser.add_json()
    options, resolved = parser.parse_with_config(arguments)
    config = resolved.config
    if options.dry_run:
        sys.stdout.write(start.describe_plan(config))
        return errors.EXIT_DONE

    run_path = Path(config.run.dir) / str(config.run.name)
    finished = options.resume == "auto" and read_finished(run_path, to_yaml(config), options.max_steps)
    if finished:  # it is not started again
        if rank.is_first_rank():
            from cmtrain.monitoring.console import print_result

            before = f"{run_path}: finished before: {finished['reason']}"
            print_lines(before, f"report {run_path / REPORT_NAME}")
            print_result(finished["result"], asked=options.json)
        return int(finished["exit_code"])

    # Start one process per GPU, unless a launcher has started this one.
    what = f"{options.config}, run folder {run_path}"
    if not rank.is_started_by_launcher():
        gpus = visible_gpus()
        nproc = options.nproc or max(1, gpus)
        if nproc > gpus > 0:
            raise errors.ConfigError(f"--nproc {nproc}: a GPU takes one process, and there are {gpus}")
        place = workers({"world_size": nproc, "device": "cuda" if gpus else "cpu"})
        start.announce(f"{what}, {place}")
        start.check_run(config, options.resume, nproc)
        if nproc > 1 or options.max_restarts:
            start.loading()  # in the ranks
            return run_ranks(sys.orig_argv, nproc, max_restarts=options.max_restarts, run_path=run_path)
    elif rank.PARENT not in os.environ:
        if options.nproc or options.max_restarts:
            what = "a launcher has started this process; give them to the launcher"
            raise errors.ConfigError(f"--nproc, --max-restarts: {what}")
        start.announce(f"{what}, started by a launcher as one of {_world_size()} processes")
        if _world_size() == 1:
            start.check_run(config, options.resume, 1)
    how = {"resume": options.resume, "max_steps": options.max_steps, "as_json": options.json}
    return rank.run_as_rank(lambda: _open_and_train(config, how), run_path)


def _open_and_train(config: Config, how: dict[str, Any]) -> int:
    data = start.open_data(config, _world_size())
    start.loading()
    from cmtrain.training.train import train  # torch is loaded here, after the mistakes

    return train(config, data=data, **how)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _demo(arguments: list[str]) -> int:
    parser = Parser("demo", "Train a small CMT on images of installed packages; no GPU, no download.")
    what = "12 colour photographs instead of handwritten digits"
    parser.add_argument("--photos", action="store_true", help=what)
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run and stop")
    parser.add_json()
    options, overrides = parser.parse(arguments)
    base, given = ("demo-photos", DEMO_PHOTOS) if options.photos else ("demo", [])
    for attempt in itertools.count(1):  # an interrupted demo continues; a finished one is left alone
        name = base if attempt == 1 else f"{base}-{attempt}"
        config = load.load_config(DEMO, [*given, ("run.name", name), *overrides]).config
        status = read_status(Path(config.run.dir) / str(config.run.name)) or {}
        if status.get("state") != "finished" or any(key == "run.name" for key, _ in overrides):
            break
    if options.dry_run:
        sys.stdout.write(start.describe_plan(config))
        return errors.EXIT_DONE
    start.announce(f"demo, run folder {config.run.dir}/{config.run.name}")
    start.check_run(config, "auto", _world_size())
    return _open_and_train(config, {"as_json": options.json})


def _bench(arguments: list[str]) -> None:
    parser = Parser("bench", "Time the loader, the model and training, and name the bottleneck.")
    add = parser.add_argument
    add("--what", choices=("loader", "model", "train", "all"), default="all", help="default: all")
    add("--steps", type=positive, default=20, metavar="N", help="steps to time of each (default: 20)")
    add("--rounds", type=positive, default=5, metavar="N", help="turns of each side (5; with model)")
    beside = "timm models to time, too (with model)"
    add("--beside", type=_names, default="resnet50,efficientnet_b0", metavar="NAMES", help=beside)
    predict = "predict the step of --what model on this GPU, kernel by kernel; needs no GPU and no data"
    add("--predict", choices=PREDICTED, help=predict)
    parser.add_json(to_file=True)
    options, resolved = parser.parse_with_config(arguments, DEMO)
    if options.predict and options.what != "model":
        raise errors.ConfigError("--predict: needs --what model")
    start.announce(f"bench of {options.config}: {options.what}")
    if not options.predict:
        start.check_places(resolved.config)
    start.loading()
    from cmtrain.commands.bench.bench import bench

    bench(resolved.config, options)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _doctor(arguments: list[str]) -> int:
    parser = Parser("doctor", "Check this machine for a run, and suggest a remedy for every problem.")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    options, resolved = parser.parse_with_config(arguments, DEMO)
    own = "" if options.config != DEMO else " (--config FILE for a run of your own)"
    start.announce(f"doctor for a run of {options.config}{own}")
    start.loading()
    from cmtrain.commands.doctor import doctor

    return doctor(resolved.config, as_json=options.json)


def _sweep(arguments: list[str]) -> int:
    parser = Parser("sweep", "Train many configurations; compare with what was published.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="configuration files, or folders such as configs/ablations")
    add("--rows", metavar="LIST", help="only these, counted from 1, such as 1,3-5")
    add("--jobs", choices=("local", "slurm"), default="local", help="one after another here (default)")
    add("--sbatch", default=sweep.SBATCH, metavar="FILE", help=f"job script (default: {sweep.SBATCH})")
    add("--scale", choices=("demo",), help="a few steps of each row on demo data, on any machine")
    add("--max-steps", type=positive, metavar="N", help="stop each row after N optimizer steps")
    add("--dry-run", action="store_true", help="print the commands and stop")
    add("--table", action="store_true", help="print the table, in Markdown, and stop")
    options, overrides = parser.parse(arguments)
    rows = sweep.read_rows(options.files, overrides, options.rows, options.scale, options.max_steps)
    script = options.sbatch if options.jobs == "slurm" else None
    if options.dry_run:
        sys.stdout.writelines(f"{shlex.join(sweep.command_of(row, script))}\n" for row in rows)
        return errors.EXIT_DONE
    code = errors.EXIT_DONE if options.table else sweep.train_rows(rows, script)
    sys.stdout.write(sweep.table(rows))
    return code


RUN_HELP = "run folder, such as runs/demo, or the name of one below runs"


def _status(arguments: list[str]) -> None:
    parser = Parser("status", "Print the state of a run.")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    options = parser.parse_alone(arguments)
    from cmtrain.commands.status import print_status

    print_status(options.run, as_json=options.json)


def _watch(arguments: list[str]) -> None:
    parser = Parser("watch", "Show the state of a run until it ends.")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    options = parser.parse_alone(arguments)
    from cmtrain.commands.status import watch

    watch(options.run)


def _repair_bn(arguments: list[str]) -> None:
    parser = Parser(
        "repair-bn",
        "Recompute BatchNorm statistics, such as those that are NaN, and write a repaired copy. Of a run: "
        "`cmtrain repair-bn runs/shoes`. Of a file by any trainer (.pth, .pt, .bin, .safetensors): "
        "`cmtrain repair-bn x.pth --config configs/demo.yaml --model.name resnet18 --data.root photos`.",
    )
    parser.add_argument("place", metavar="RUN|FILE", help="run, checkpoint folder, weights file")
    parser.add_argument("--config", metavar="FILE", help="model and data; a run has its own")
    parser.add_argument("--out", metavar="PATH", help="default: x-repaired.pth for x.pth, RUN/repaired")
    parser.add_argument("--batches", type=positive, default=200, metavar="N", help="to average over (200)")
    parser.add_json()
    options, overrides = parser.parse(arguments)
    config = load.load_config(options.config, overrides).config if options.config else None
    start.announce(f"repair-bn of {options.place}")
    place = Path(options.place)
    if place.suffix in WEIGHTS_SUFFIXES and not place.exists():
        raise DataError(f"{options.place}: no such file")
    if checked := config or (None if place.is_file() else start.check_trained(options.place, overrides)):
        start.check_places(checked)
    start.loading()
    from cmtrain.commands.repair_bn import repair_bn

    repair_bn(options.place, config, overrides, options.out, options.batches, as_json=options.json)


def _report(arguments: list[str]) -> None:
    parser = Parser("report", "Draw a run folder as one HTML file; several runs are compared.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, such as runs/demo")
    what = "default: RUN/report.html, or report.html for several runs"
    parser.add_argument("--out", type=out_file, metavar="FILE", help=what)
    options = parser.parse_alone(arguments)
    from cmtrain.monitoring.report.page import report

    report([run if os.path.exists(run) else str(RUNS / run) for run in options.runs], options.out)


def _config_show(arguments: list[str]) -> None:
    parser = Parser("config show", "Print the configuration and where each value comes from.")
    _, resolved = parser.parse_with_config(arguments)
    sys.stdout.write(to_yaml(resolved.config, resolved.origins))


def _config_schema(arguments: list[str]) -> None:
    Parser("config schema", "Print the JSON schema of configuration files.").parse_alone(arguments)
    sys.stdout.write(json.dumps(describe.config_schema(), indent=2) + "\n")


def _config_reference(arguments: list[str]) -> None:
    Parser("config reference", "Print every key, its range and default.").parse_alone(arguments)
    sys.stdout.write(describe.config_reference())


_CONFIG_VERBS = {"show": _config_show, "schema": _config_schema, "reference": _config_reference}
_VERBS: dict[str, Verb] = {
    "train": _train, "doctor": _doctor, "demo": _demo, "sweep": _sweep, **MODEL_VERBS,
    "status": _status, "watch": _watch, "report": _report, "bench": _bench, "repair-bn": _repair_bn,
    "data": partial(run_group, "data", DATA_VERBS), "config": partial(run_group, "config", _CONFIG_VERBS),
}  # fmt: skip
_READERS = ("status", "watch", "report", "config")  # they compute nothing, in one process
