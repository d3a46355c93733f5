"""Show what was measured as a table of five columns, with words and units; the JSON has all figures."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cmtrain.commands.bench.timing import Row

Columns = dict[str, Callable[[Row], str]]  # header -> text of a row


def draw(title: str, first: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` on stderr. Columns named in `first` hold words, `columns` numbers with their units."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for name in first:
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    for cells in rows:
        table.add_row(*cells)
    Console(stderr=True, highlight=False, markup=False).print(table)


def show(report: dict[str, Any]) -> None:
    """Print the table of a report of `cmtrain bench`, and its verdict."""
    figures, columns = dict(report["figures"]), columns_of(report)
    machine = figures.pop("machine", None)
    title = f"{report['model']} at {report['image_px']} px, {report['precision']}, {report['device']}, "
    title += f"{report['batch']} image{'s' if report['batch'] > 1 else ''} at once"
    rows = [[name, *(text(row) for text in columns.values())] for name, row in figures.items()]
    draw(title, ["measured"], list(columns), rows)
    lines = Console(stderr=True, highlight=False, markup=False)
    if machine:
        copies, products = machine["copy_gb_per_second"], machine["matrix_tflops"]
        lines.print(f"this machine copies {copies:,.3g} GB/s and multiplies {products:,.3g} TFLOP/s")
    lines.print(report["verdict"])


def columns_of(report: dict[str, Any]) -> Columns:
    """Return the columns beside the name, by what was measured; one more if it was compared."""
    first = report["model"]
    rate: Columns = {"images/s": lambda row: _number(row, "images_per_second")}
    faster: Columns = {f"{first} is": lambda row: _number(row, "first_is_times", " x as fast")}
    what = report["what"]
    if what == "model":
        columns = rate | {"ms per step (95 % within)": _within} | faster | {"of the machine's best": uses}
    elif what == "latency":
        columns = rate | {"ms (95 % within)": _within, "first call": _first_call} | faster
    elif what == "guard":
        columns = {
            "ms": lambda row: _number(row, "ms"),
            "of a step": lambda row: _number(row, "percent", " %"),
            "lowest round": lambda row: _number(row, "percent_min", " %"),
            "highest round": lambda row: _number(row, "percent_max", " %"),
        }
    else:
        columns = rate | {
            "ms per step": lambda row: _number(row, "step_ms_mean"),
            "lost to loading": lambda row: _number(row, "data_wait_percent", " %"),
            "of the machine's best": uses,
        }
    if any("times_earlier" in row for row in report["figures"].values()):
        columns["earlier rate"] = lambda row: _number(row, "times_earlier", " x")
    return columns


def uses(row: Row) -> str:
    """Return what a model uses of the machine: shares of its best rates, and its memory at the peak."""
    names = {
        "percent_of_copy": ("memory", 1),
        "percent_of_matrix": ("compute", 1),
        "host_share": ("host", 100),
    }
    parts = [f"{name} {scale * row[key]:.0f} %" for key, (name, scale) in names.items() if key in row]
    return ", ".join(parts + ([f"{row['peak_memory_gib']:.1f} GiB"] if "peak_memory_gib" in row else []))


def _within(row: Row) -> str:
    return f"{_number(row, 'ms_p50')} ({_number(row, 'ms_p95')})" if "ms_p50" in row else ""


def _first_call(row: Row) -> str:
    return _number(row, "first_seconds", " s")


def _number(row: Row, key: str, unit: str = "") -> str:
    if (value := row.get(key)) is None:
        return ""
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits}{unit}"
