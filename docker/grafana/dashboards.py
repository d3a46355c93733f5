"""Write the dashboards that Grafana loads, from panels.py: `make dashboards`.

The JSON is committed: this program and Grafana's SDK are needed only to change a panel. The SDK is
`grafana-foundation-sdk==1769699379!11.6.0`; without the pin, pip picks the schema of Grafana 10.1.
"""

from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import xychart as xy
from panels import ANNOTATIONS, FLEET_ROWS, RUN_ROWS, Panel, PanelRow

FOLDER = Path(__file__).parent / "dashboards"
COLUMNS = 24
RUN_UID, FLEET_UID = "cmtrain-run", "cmtrain-fleet"

BUILDERS = {
    "timeseries": timeseries.Panel,
    "stat": stat.Panel,
    "statetimeline": statetimeline.Panel,
    "bargauge": bargauge.Panel,
    "table": table.Panel,
    "xychart": xychart.Panel,
}
LAST_VALUE = ("stat", "bargauge", "table")  # kinds that need one sample, not a curve
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")


def build_panel(panel: Panel, number: int, x: int, y: int) -> Any:
    built = (
        BUILDERS[panel.kind]()
        .id(number)
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .unit(panel.unit)
        .grid_pos(model.GridPos(h=panel.height, w=panel.width, x=x, y=y))
    )
    for letter, (legend, expr) in zip("ABCDEFGHIJ", panel.queries.items(), strict=False):
        query = prometheus.Dataquery().ref_id(letter).datasource(SOURCE).expr(expr).legend_format(legend)
        query = query.instant() if panel.kind in LAST_VALUE else query.range()
        if panel.kind in ("table", "xychart"):
            query = query.format("table")
        built = built.with_target(query)
    marks = [(panel.warn_at, "orange"), (panel.critical_at, "red")]
    steps = [model.Threshold(value=None, color="green")]
    steps += [model.Threshold(value=value, color=color) for value, color in marks if value is not None]
    built = built.thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    if panel.no_value:
        built = built.no_value(panel.no_value)
    if panel.kind in ("timeseries", "xychart"):
        built = built.legend(legend_below(["lastNotNull"] if panel.kind == "timeseries" else []))
    if panel.kind == "timeseries":
        built = draw_curves(built, panel, has_lines=len(steps) > 1)
    if panel.kind == "xychart":
        built = draw_over_each_other(built, panel)
    if panel.kind == "table" and len(panel.queries) > 1:
        built = join_by_run(built, panel)
    return built


def legend_below(calcs: list[str]) -> Any:
    legend = common.VizLegendOptions().show_legend(True).calcs(calcs)
    return legend.display_mode(looks.LegendDisplayMode.LIST).placement(looks.LegendPlacement.BOTTOM)


def draw_curves(built: Any, panel: Panel, *, has_lines: bool) -> Any:
    built = built.tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI))
    built = built.show_points(looks.VisibilityMode.AUTO).fill_opacity(60 if panel.stacked else 5)
    if has_lines:
        built = built.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.DASHED)
        )
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if panel.log_base:
        scale = common.ScaleDistributionConfig().type(looks.ScaleDistribution.LOG).log(panel.log_base)
        return built.scale_distribution(scale)
    return built.axis_soft_min(0)


def draw_over_each_other(built: Any, panel: Panel) -> Any:
    """Draw one line per run: its first query is x, its second one y, at the same times.

    The answers become one table (Time, run, x, y), which is split by run again. The chart takes the first
    number of each part as x.
    """
    names = {f"Value #{letter}": column for letter, column in zip("AB", panel.queries, strict=True)}
    parted = {"fields": ["run"], "keepFields": False, "naming": {"asLabels": True}}
    built = built.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    organize = {"excludeByName": {"Time": True}, "renameByName": names}
    built = built.with_transformation(model.DataTransformerConfig(id_val="organize", options=organize))
    built = built.with_transformation(
        model.DataTransformerConfig(id_val="partitionByValues", options=parted)
    )
    built = built.mapping(xy.SeriesMapping.AUTO).series([xychart.XYSeriesConfig()])
    return built.show(xy.XYShowMode.LINES).line_width(1)


def join_by_run(built: Any, panel: Panel) -> Any:
    """Show one line per run and one column per query; the columns of the first query are its labels."""
    _, *columns = panel.queries
    units = {"progress": "percentunit", "best top-1": "percentunit", "time left": "s"}
    names = {f"Value #{letter}": column for letter, column in zip("BCDEFGHIJ", columns, strict=False)}
    hidden = dict.fromkeys(["Time", "Value #A", "__name__", "job", "instance", "rank"], True)
    built = built.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    organize = {"excludeByName": hidden, "renameByName": names}
    built = built.with_transformation(model.DataTransformerConfig(id_val="organize", options=organize))
    for column, unit in units.items():
        built = built.override_by_name(column, [model.DynamicConfigValue(id_val="unit", value=unit)])
    link = {"title": "open", "url": f"/d/{RUN_UID}?var-run=${{__value.raw}}&${{datasource:queryparam}}"}
    return built.override_by_name("run", [model.DynamicConfigValue(id_val="links", value=[link])])


def add_rows(board: Any, rows: tuple[PanelRow, ...]) -> Any:
    """Place panels from left to right, in lines as high as their highest panel; each row begins a line."""
    number, y = 1, 0
    for row in rows:
        line = model.GridPos(h=1, w=COLUMNS, x=0, y=y)
        board = board.with_row(dashboard.Row(row.title).id(number).grid_pos(line))
        number, y, x, height = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            board = board.with_panel(build_panel(panel, number, x, y))
            number, x, height = number + 1, x + panel.width, max(height, panel.height)
        y += height
    return board


def add_variable(board: Any, name: str, label: str, query: str) -> Any:
    """Add a choice of label values; at first all are chosen."""
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    return board.with_variable(
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NUMERICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(everything)
    )


def make(title: str, uid: str, description: str, rows: tuple[PanelRow, ...]) -> str:
    """Return one dashboard as JSON."""
    board = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["cmtrain"])
        .readonly()
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    others = dashboard.DashboardLink("cmtrain").type(model.DashboardLinkType.DASHBOARDS).tags(["cmtrain"])
    board = board.link(others.keep_time(True))
    board = add_variable(board, "run", "Run", "label_values(cmtrain_step, run)")
    if uid == RUN_UID:
        board = add_variable(board, "rank", "Rank", 'label_values(cmtrain_step{run=~"$run"}, rank)')
        for name, (color, expr) in ANNOTATIONS.items():
            mark = (
                dashboard.AnnotationQuery()
                .name(name)
                .datasource(SOURCE)
                .enable(True)
                .icon_color(color)
                .expr(expr)
            )
            board = board.annotation(mark)
    return JSONEncoder(sort_keys=True, indent=1).encode(add_rows(board, rows).build()) + "\n"


def make_all() -> dict[str, str]:
    """Return the JSON by file name."""
    return {
        "run.json": make("cmtrain run", RUN_UID, "How a run, or a few, are doing, and why.", RUN_ROWS),
        "fleet.json": make("cmtrain fleet", FLEET_UID, "All runs, side by side.", FLEET_ROWS),
    }


if __name__ == "__main__":
    for file_name, text in make_all().items():
        (FOLDER / file_name).write_text(text)
