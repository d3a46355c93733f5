"""Charts show all of their data: no spike is lost, no value is outside, no two ticks have one label."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from cmtrain.monitoring.report.charts import (
    Series,
    heat_map,
    line_chart,
    linear_axis,
    log_axis,
    make_axis,
    thin,
)  # fmt: skip
from cmtrain.monitoring.units import short


def points(svg: str) -> np.ndarray:
    """Return the (N, 2) points of the first line of a chart."""
    path = re.search(r'<path d="([^"]*)" class="line', svg)
    return np.array([[float(v) for v in pair] for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path[1])])


def test_a_spike_of_one_step_in_half_a_million_survives_thinning():
    x = np.arange(500_000.0)
    y = np.sin(x / 1e5)
    y[321_987], y[44_444] = 50.0, -50.0
    kept = thin(x, y, 600)
    assert len(kept) <= 1_202
    assert {321_987, 44_444, 0, 499_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_many_points_become_a_band_and_a_trend_that_no_spike_bends():
    x = np.arange(100_000.0)
    y = np.ones(100_000)
    y[50_000], y[20_000:30_000] = 1e6, np.nan
    svg = line_chart("t", [Series("s", x, y)], key="k", x_high=1e5, scale="log", height_px=100).svg
    band = re.search(r'<path d="([^"]*)" class="band', svg)[1]
    assert " 1." in band or " 2." in band or " 3." in band  # up to the spike, at the top
    trend = points(svg)
    assert len(trend) == 180
    assert np.ptp(trend[:, 1]) == 0


def test_a_hole_stays_a_hole_and_a_lone_point_stays_visible():
    y = np.ones(10_000)
    y[2_000:4_000] = np.nan
    assert np.isnan(y[thin(np.arange(10_000.0), y, 100)]).any()
    chart = line_chart(
        "t", [Series("s", np.arange(5.0), np.array([1, np.nan, 2, np.nan, 3]))], key="k", x_high=4
    )
    path = re.search(r'<path d="([^"]*)" class="line', chart.svg)[1]
    assert path.count("M") == path.count("h0") == 3


def test_every_value_lies_inside_the_plot():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = np.sort(rng.uniform(0, 1e4, 100)), rng.normal(size=100) * 10.0 ** rng.integers(-6, 6)
        for scale in ("linear", "auto", "log"):
            values = np.abs(y) if scale == "log" else y
            drawn = points(
                line_chart(
                    "t", [Series("s", x, values)], key="k", x_high=1e4, scale=scale, height_px=150
                ).svg
            )
            assert len(drawn) == 100
            assert ((drawn >= 0) & (drawn <= [1000, 150])).all()


@pytest.mark.parametrize("size", [1e-30, 3e-7, 4e-4, 0.013, 1.0, 97.0, 12_345.0, 8e6, 2e11, 1e25])
@pytest.mark.parametrize("spread", [0.01, 0.7, 1.0, 40.0, 1e7])
def test_ticks_are_few_ascending_and_distinct(size, spread):
    axes = [linear_axis(size, size * (1 + spread), count) for count in (4, 6)] + [
        log_axis(size, size * (1 + spread))
    ]
    for axis in axes:
        values, labels = zip(*axis.ticks, strict=True) if axis.ticks else ((), ())
        assert len(values) <= 8
        assert list(values) == sorted(values)
        assert len(set(labels)) == len(labels), labels
        assert max(map(len, labels), default=0) <= 10, labels
        placed = axis.place([size, size * (1 + spread)])
        assert ((placed >= -1e-5) & (placed <= 1 + 1e-5)).all()


def test_loss_scales_have_a_logarithmic_axis_and_spikes_make_one():
    axis = make_axis(np.array([1.0, 1024.0, 65_536.0]), "log")
    assert axis.log
    assert [label for _, label in axis.ticks] == ["1", "10", "100", "1k", "10k", "100k"]
    assert not make_axis(np.array([7.0, 3.0, 1.0]), "auto").log
    assert make_axis(np.array([7.0, 3.0, 2.0, 1e6]), "auto").log
    assert not make_axis(np.array([7.0, 0.0, 2.0, 1e6]), "auto").log
    assert make_axis(np.empty(0), "auto").ticks


def test_numbers_are_short():
    assert [short(v) for v in (0.0, 0.13628, 12.5, 35_184.0, 5e-5, 1_281_167.0, -2.0)] == [
        "0", "0.1363", "12.5", "35.18k", "5e-5", "1.281M", "-2",
    ]  # fmt: skip


def test_a_screen_reader_gets_a_description():
    chart = line_chart(
        "Loss", [Series("training", np.array([10.0, 20, 30]), np.array([3.0, 5, 1]))], key="loss", x_high=30
    )
    root = ElementTree.fromstring(chart.svg)
    described = {element.get("id"): element.text for element in root.iter() if element.get("id")}
    assert (
        described[root.get("aria-describedby")]
        == "training: from 3 at step 10 to 1 at step 30; lowest 1, highest 5."
    )
    assert chart.legend == [("training", "c0", "1")]
    empty = line_chart("Loss", [], key="loss", x_high=1)
    assert "Nothing was recorded." in empty.svg


def test_a_heat_map_of_a_hundred_classes_is_small_and_complete():
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 9, (100, 100))
    names = [f"class {index} with a long name, which its title has in full" for index in range(100)]
    svg = heat_map(matrix, names, key="k")
    assert svg.count("class 99 with a long na\u2026") == svg.count(f"<title>{names[99]}</title>") == 2
    assert svg.count("M") == np.count_nonzero(matrix)
    assert svg.count("<path") <= 16
    assert len(svg) < 200_000


def test_names_are_escaped():
    evil = '"><script>alert(1)</script>'
    chart = line_chart(
        evil,
        [Series(evil, np.arange(2.0), np.ones(2))],
        key="k",
        x_high=1,
        level=(1.0, evil),
        marks=[(0, "start", evil)],
    )
    drawn = heat_map(np.ones((2, 2), int), [evil, evil], key="k")
    for svg in (chart.svg, drawn):
        assert "<script" not in svg
        ElementTree.fromstring(svg)
