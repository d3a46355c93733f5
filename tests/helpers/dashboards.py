"""Read the dashboards, alerts and rules that ship."""

import json
import re

import yaml

from cmtrain.monitoring.metrics import TrainMetrics
from helpers.runs import ROOT

FOLDER = ROOT / "docker" / "grafana" / "dashboards"


DASHBOARDS = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


RULES = [
    rule
    for group in yaml.safe_load((ROOT / "docker" / "prometheus" / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]


ALERTS = [rule for rule in RULES if "alert" in rule]


RECORDED = {rule["record"] for rule in RULES if "record" in rule}


RULE_TESTS = yaml.safe_load((ROOT / "docker" / "prometheus" / "rules_test.yaml").read_text())["tests"]


def panels_of(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard):
    panels = [target["expr"] for panel in panels_of(dashboard) for target in panel["targets"]]
    return panels + [annotation["expr"] for annotation in dashboard.get("annotations", {}).get("list", [])]


ASKED = [expr for dashboard in DASHBOARDS.values() for expr in expressions(dashboard)]


def names_in(text):
    """Return the names of our own series; a recorded one does not count as the metric within its name."""
    return set(re.findall(r"(?<![\w:])cmtrain_\w+\b(?!:)", text))


def families():
    """Return the names of the series of each metric family."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
    return {
        family.name: {family.name + suffix for suffix in suffixes[family.type]}
        for family in TrainMetrics("r", 0).registry.collect()
        if family.name.startswith("cmtrain_")
    }
