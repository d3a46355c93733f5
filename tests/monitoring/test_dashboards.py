"""Dashboards, rules and documentation are well formed, and use metrics that exist. Needs no server."""

import importlib
import itertools
import re

import pytest
from helpers.dashboards import (
    ALERTS,
    ASKED,
    DASHBOARDS,
    FOLDER,
    RECORDED,
    RULE_TESTS,
    RULES,
    expressions,
    families,
    names_in,
    panels_of,
)
from helpers.runs import ROOT
from helpers.tools import need

DOCUMENTATION = (ROOT / "docs" / "metrics.md").read_text()

# Neither drawn nor alerted on: what follows from others, and what is for people who ask.
NOT_SHOWN = {"cmtrain_run_info"}


def recorded_in(text):
    return set(re.findall(r"\brun\w*:cmtrain_\w+:\w+", text))


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap_and_have_ids_of_their_own(name):
    panels = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = set(itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ))  # fmt: skip
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_panel_has_a_unit_and_an_instruction(name):
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == f"cmtrain-{name.removesuffix('.json')}"
    for panel in panels_of(dashboard):
        title = panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["description"].endswith("."), title
        assert panel["targets"], title
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), title
        thresholds = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert thresholds[0] is None, title
        assert thresholds[1:] == sorted(thresholds[1:]), title
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_show_the_chosen_runs_only(name):
    dashboard = DASHBOARDS[name]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"datasource", "run"} <= variables
    for expr in expressions(dashboard):
        assert 'run=~"$run"' in expr, expr
        assert set(re.findall(r"\$(?!__)(\w+)", expr)) <= variables, expr


def test_loss_over_steps_is_split_by_run():
    """Grafana takes the first number of each part as x, so the query of the step has to be the first."""
    (panel,) = [panel for panel in panels_of(DASHBOARDS["fleet.json"]) if panel["type"] == "xychart"]
    assert [target["format"] for target in panel["targets"]] == ["table"] * 2
    assert all(target["range"] and not target.get("instant") for target in panel["targets"])
    metrics = [names_in(target["expr"]) for target in panel["targets"]]
    assert metrics == [{"cmtrain_step"}, {"cmtrain_train_loss"}]
    assert all(target["expr"].startswith("max by (run) (") for target in panel["targets"])
    merge, organize, parted = panel["transformations"]
    assert (merge["id"], organize["id"], parted["id"]) == ("merge", "organize", "partitionByValues")
    letters = [f"Value #{target['refId']}" for target in panel["targets"]]
    assert list(organize["options"]["renameByName"]) == letters
    assert parted["options"]["fields"] == ["run"]


def test_committed_dashboards_are_what_the_generator_makes(monkeypatch):
    need("grafana_foundation_sdk")
    monkeypatch.syspath_prepend(str(ROOT / "docker" / "grafana"))
    made = importlib.import_module("dashboards").make_all()
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == made


@pytest.mark.parametrize("place", ["dashboards", "rules", "documentation"])
def test_queries_use_metrics_that_exist(place):
    text = {
        "dashboards": "\n".join(ASKED),
        "rules": "\n".join(rule["expr"] for rule in RULES),
        "documentation": DOCUMENTATION,
    }[place]
    assert names_in(text) <= set().union(families(), *families().values())
    assert recorded_in(text) <= RECORDED


def test_every_metric_is_shown_or_alerted_on():
    used = names_in("\n".join(ASKED + [rule["expr"] for rule in RULES]))
    for family, series in families().items():
        assert series & used or family in NOT_SHOWN, f"{family} is in no dashboard and in no rule"
    assert recorded_in("\n".join(ASKED + [rule["expr"] for rule in RULES])) >= RECORDED


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_has_a_cause_and_an_instruction(alert):
    assert alert["labels"]["severity"] in ("critical", "warning")
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    assert "$labels.run" in annotations["summary"]
    assert "$value" in annotations["description"]
    assert len(annotations["runbook"]) > 60
    severity, duration = alert["labels"]["severity"], alert.get("for", "0m")
    row = f"| `{alert['alert']}` | {severity} | {duration} | {annotations['runbook']} |"
    assert row in DOCUMENTATION.splitlines(), f"docs/metrics.md misses or contradicts\n{row}"


def test_recorded_series_are_documented():
    assert set(re.findall(r"^\| `(run\w*:[\w:]+)` \|", DOCUMENTATION, re.MULTILINE)) == RECORDED


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_is_tested_to_fire_and_to_resolve(alert):
    name = alert["alert"]
    (test,) = [test for test in RULE_TESTS if test["name"] == name]
    checks = [check for check in test["promql_expr_test"] if f'"{name}"' in check["expr"]]
    fired = [bool(check.get("exp_samples")) for check in checks]
    assert fired[0] is False, "silent before it fires"
    assert any(fired)
    runs = [set(re.findall(r'run="(\w+)"', str(check.get("exp_samples", [])))) for check in checks]
    assert set().union(*runs) - runs[-1], "some run's alert has resolved at the last check"
