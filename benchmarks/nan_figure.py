"""Draw docs/nan.svg: the failure that stopped the re-implementation's SGD run, with and without the guard.

    python benchmarks/nan_figure.py [--out FILE]       # on a CPU, a minute

Three runs of cmt_micro on the demo's digits in fp16 (rounded as on a GPU, by tests/helpers/half.py): SGD at
a learning rate of 0.1; at the re-implementation's 1.6, without warm-up; and at 1.6 without the guard.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cmtrain.monitoring.report.charts import Mark, Series, line_chart

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """\
model: {name: cmt_micro}
data: {root: demo:digits, image_px: 32, eval_resize_px: 32}
augment: {scale: [0.6, 1.0], hflip: 0.0, color_jitter: 0.3}
mixing: {smoothing: 0.1}
optim: {opt: sgd, lr: 1.6, weight_decay: 1e-4}
schedule: {epochs: 6, warmup_epochs: 0}
train: {global_batch_size: 64, log_every_steps: 5}
guard: {rollback_after_bad_steps: 10}
metrics: {enabled: false}
"""
RUNS = {  # name: arguments, colour
    "lr 0.1": (["--optim.lr", "0.1"], 2),
    "lr 1.6, guarded": ([], 0),
    "lr 1.6, not guarded": (["--guard.enabled", "false"], 1),
}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 } .title { font-weight: 600; fill: #111 }
.grid { stroke: #ddd } text.y { text-anchor: end } text.x { text-anchor: middle }
.line { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke } .band { opacity: 0 }
.dots { fill: none; stroke-width: 6; stroke-linecap: round; vector-effect: non-scaling-stroke }
.c0 { stroke: #0b7a75 } .c1 { stroke: #c2410c } .c2 { stroke: #8a8a8a }
text.c0 { fill: #0b7a75; stroke: none } text.c1 { fill: #c2410c; stroke: none }
text.c2 { fill: #777; stroke: none }
.mark { stroke: #0b7a75; stroke-dasharray: 3 3 }
"""
WIDTH_PX, HEIGHT_PX, LEFT_PX, TOP_PX, RIGHT_PX = 720, 280, 52, 56, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "nan.svg")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "nan.yaml").write_text(RECIPE)
        series, marks = [], []
        for name, (arguments, color) in RUNS.items():
            run = _train(Path(folder), name.replace(" ", "-").replace(",", ""), arguments)
            with open(run / "summary.csv") as file:
                rows = list(csv.DictReader(file))
            steps, top1 = (np.array([float(row[key]) for row in rows]) for key in ("step", "eval_top1"))
            series.append(Series(name, np.r_[0, steps], np.r_[0.1, top1], color=color, dots=True))
            for line in (run / "events.jsonl").read_text().splitlines():
                event = json.loads(line)
                if event["event"] == "rollback" and color == 0:
                    marks.append(Mark(event["step"], "rollback", "back to a good state"))
            print(f"{name}: top-1 {', '.join(f'{value:.3f}' for value in top1)}")
    chart = line_chart(
        "validation top-1", series, key="nan", x_high=float(max(line.x[-1] for line in series)),
        percent=True, scale="zero", marks=marks, height_px=HEIGHT_PX - TOP_PX - 30,
    )  # fmt: skip
    plot = ElementTree.fromstring(chart.svg)
    size = {"x": LEFT_PX, "y": TOP_PX, "width": WIDTH_PX - LEFT_PX - RIGHT_PX, "overflow": "visible"}
    plot.attrib |= {key: str(value) for key, value in size.items()}
    figure = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", width=f"{WIDTH_PX}")
    figure.set("viewBox", f"0 0 {WIDTH_PX} {HEIGHT_PX}")
    ElementTree.SubElement(figure, "style").text = STYLE
    ElementTree.SubElement(figure, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    title = (
        "Validation top-1 over steps. Dashed: the guarded run goes back to a good state and lowers its rate."
    )
    ElementTree.SubElement(figure, "text", {"class": "title", "x": "12", "y": "20"}).text = title
    for index, line in enumerate(series):
        place = {"class": f"c{line.color}", "x": f"{LEFT_PX + 150 * index}", "y": "42"}
        ElementTree.SubElement(figure, "text", place).text = line.name
    figure.append(plot)
    out.write_text(ElementTree.tostring(figure, encoding="unicode") + "\n")


def _train(folder: Path, name: str, arguments: list[str]) -> Path:
    script = ROOT / "tests" / "helpers" / "half_train.py"
    where = ["--config", folder / "nan.yaml", "--run.dir", folder, "--run.name", name]
    command = [sys.executable, script, *where]
    environment, quiet = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.DEVNULL
    subprocess.run([*command, *arguments], env=environment, stderr=quiet, stdout=quiet, check=True)
    return folder / name


if __name__ == "__main__":
    main()
