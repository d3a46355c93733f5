"""Rules and dashboards work in a real Prometheus that watches real training; promtool accepts the rules."""

import http.client
import http.server
import json
import re
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from helpers.dashboards import ALERTS, ASKED, RECORDED, RULE_TESTS, families
from helpers.runs import HANG_SECONDS, ROOT, Forked
from helpers.tools import needs

RULES = ROOT / "docker" / "prometheus" / "rules.yaml"

needs_promtool, needs_prometheus = needs("promtool"), needs("prometheus")

# What Grafana would put in. Two seconds of scrapes are enough for a rate here.
VARIABLES = {"$__rate_interval": "15s", "$__interval": "15s", "$__range": "5m", "$run": ".+", "$rank": ".+"}

# What dcgm-exporter serves on a node whose first GPU is that of rank 0 (its names:
# etc/default-counters.csv), and what rank 0 itself would serve there.
GPU_PAGE = """
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1",hostname="node"} 97
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{gpu="0",UUID="GPU-1",hostname="node"} 0.41
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-1",hostname="node"} 612.5
DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-1",hostname="node"} 61
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-1",hostname="node"} 40960
DCGM_FI_DEV_XID_ERRORS{gpu="0",UUID="GPU-1",hostname="node"} 0
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-2",hostname="node"} 3
cmtrain_gpu_info{run="job",rank="0",UUID="GPU-1",model="NVIDIA H100 80GB HBM3"} 1
cmtrain_gpu_memory_bytes{run="job",rank="0",kind="peak"} 4e10
"""


def promtool(*arguments: str | Path, **how: Any) -> str:
    """Return its output, whether or not it accepts the input."""
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=600, check=False, **how
    )
    return done.stdout + done.stderr


def passes(*arguments: str | Path, **how: Any) -> bool:
    output = promtool(*arguments, **how)
    return "SUCCESS" in output and "FAILED" not in output


@needs_promtool
def test_rules_are_valid():
    assert passes("check", "rules", RULES)


@needs_promtool
def test_the_configuration_of_compose_is_valid():
    assert passes("check", "config", RULES.with_name("prometheus.yaml"))  # and the rules that it names


@needs_promtool
def test_a_configuration_with_a_mistake_does_not_pass(tmp_path):
    """Proves that the tests above can fail."""
    text = RULES.with_name("prometheus.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(RULES.read_text())
    for wrong in (text.replace("file_sd_configs", "file_configs"), text.replace("rules.yaml", "rule.yaml")):
        (tmp_path / "prometheus.yaml").write_text(wrong)
        assert not passes("check", "config", tmp_path / "prometheus.yaml")


@needs("amtool")
def test_the_configuration_of_alertmanager_is_valid():
    path = ROOT / "docker" / "alertmanager.yaml"
    done = subprocess.run(
        ["amtool", "check-config", path], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_keep_silent_and_resolve():
    output = promtool("test", "rules", RULES.with_name("rules_test.yaml"))
    assert "SUCCESS" in output, output


@needs_promtool
def test_the_text_of_an_alert_has_no_holes(tmp_path):
    """Expects nothing of an alert when it fires: promtool then prints its text."""
    tests = []
    for test in RULE_TESTS[1:]:
        firing = [
            check
            for check in test["promql_expr_test"]
            if "firing" in check["expr"] and "exp_samples" in check
        ]
        asked = {"eval_time": firing[0]["eval_time"], "alertname": test["name"]}
        tests.append({key: test[key] for key in ("interval", "input_series")} | {"alert_rule_test": [asked]})
    path = tmp_path / "test.yaml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests})
    )
    texts = dict(
        re.findall(r'alertname="(\w+)".*\n\s+Annotations:\{(.*)\}', promtool("test", "rules", path))
    )
    assert set(texts) == {alert["alert"] for alert in ALERTS}
    for name, annotations in texts.items():
        assert not re.search(r"\{\{|<no value>|<error", annotations), f"{name}: {annotations}"


class Gpus(http.server.BaseHTTPRequestHandler):
    """Serve GPU_PAGE."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(GPU_PAGE.encode())

    def log_message(self, *args: Any) -> None: ...


@dataclass
class Watched:
    """A Prometheus, a run `job` of two ranks and a run `other` of one, in one folder of runs."""

    port: int
    server: "subprocess.Popen[str]"
    folder: Path
    job: Forked
    other: Forked

    def get(self, path: str, **parameters: str) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(
                "GET", f"{path}?" + "&".join(f"{k}={quote(v)}" for k, v in parameters.items())
            )
            response = connection.getresponse()
            content = response.read()
            if response.status == 503:  # it is starting, too
                return {"status": "starting", "data": {"result": []}}
            return json.loads(content)
        except ConnectionRefusedError:  # it is starting
            return {"status": "error", "data": {"result": []}}
        finally:
            connection.close()

    def ask(self, query: str) -> list[dict]:
        return self.get("/api/v1/query", query=query).get("data", {}).get("result", [])

    def wait(self, condition: Any) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            assert self.server.poll() is None, "Prometheus has ended"
            assert time.monotonic() < deadline, self.job.outputs[1].read_text()[-2000:]
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("watched")
    gpus = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gpus)
    threading.Thread(target=gpus.serve_forever, daemon=True).start()
    scraped = {"job_name": "dcgm", "static_configs": [{"targets": [f"127.0.0.1:{gpus.server_address[1]}"]}]}
    # The folder is not there yet, so Prometheus cannot watch it: it looks again after refresh_interval.
    targets = {"files": [f"{folder}/runs/.targets/*.json"], "refresh_interval": "1s"}
    found = {"job_name": "cmtrain", "file_sd_configs": [targets]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [found, scraped],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    run = {
        "run": {"seed": 1},
        "model": {"name": "cmt_micro"},
        "data": {
            "root": str(images),
            "image_px": 32,
            "eval_resize_px": 36,
            "threads": 1,
            "cache_dir": f"{folder}/c",
        },
        "optim": {"lr": 2e-3},
        "schedule": {"epochs": 100_000},
        "train": {
            "global_batch_size": 16,
            "max_batch_per_gpu": 8,
            "log_every_steps": 2,
            "precision": "fp32",
        },
        "evaluate": {"every_epochs": 3},
        "checkpoint": {"every_epochs": 3},
        "ema": {"decay": 0.9},
        "metrics": {"port": free_port()},
    }
    port, started = free_port(), []
    options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data"}
    options |= {"web.listen-address": f"127.0.0.1:{port}"}
    with (folder / "prometheus.log").open("w") as log:
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        server = subprocess.Popen(command, stderr=log, text=True)
    try:
        for name, nproc in (("job", 2), ("other", 1)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
            started.append(Forked(["cmtrain", "--config", f"{name}.yaml"], folder, {}, nproc))
        yield Watched(port, server, folder, *started)
    finally:
        for process in started:
            for rank in process.processes:
                rank.kill()
                rank.join()
        server.terminate()
        server.wait(60)
        gpus.shutdown()
        gpus.server_close()


def is_rare(expr: str) -> bool:
    """Return whether a query has no value while all is well."""
    is_of_several_classes = "mean_average_precision" in expr  # an image, which these runs do not have
    return is_of_several_classes or "ALERTS" in expr or ("> 0" in expr and "changes(" in expr)


@needs_prometheus
def test_every_panel_gets_an_answer(watched):
    open_questions = list(dict.fromkeys(ASKED))

    def answered(expr: str) -> bool:
        query = expr
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        answer = watched.get("/api/v1/query", query=query)
        if answer["status"] != "success":
            assert "error" not in answer, f"{query}: {answer['error']}"
            return False
        return is_rare(expr) or any(series["value"][1] != "NaN" for series in answer["data"]["result"])

    def all_answered() -> bool:
        assert watched.job.poll() is None, "the run has ended"
        open_questions[:] = [expr for expr in open_questions if not answered(expr)]
        return not open_questions

    try:
        watched.wait(all_answered)
    except AssertionError as error:
        pytest.fail(f"{error}\nno answer:\n" + "\n".join(open_questions))


@needs_prometheus
def test_rules_are_evaluated_and_nothing_fires_in_a_sound_run(watched):
    def errors() -> dict[str, str]:
        groups = watched.get("/api/v1/rules").get("data", {}).get("groups", [])
        rules = [rule for group in groups for rule in group["rules"]]
        return {rule["name"]: rule["lastError"] for rule in rules if rule.get("lastError")}

    watched.wait(lambda: errors() or all(watched.ask(f'{name}{{run="job"}}') for name in RECORDED))
    assert errors() == {}
    assert watched.ask('ALERTS{run="job",alertstate="firing"}') == []
    # On a busy machine one rank may be behind the other for a while; what is wrong with the run itself never
    # is.
    assert (
        watched.ask('ALERTS{run="job",alertname!~"CmtrainStraggler|CmtrainDataBound|CmtrainThroughputDrop"}')
        == []
    )


@needs_prometheus
@needs_promtool
def test_what_a_rank_serves(watched):
    """Well formed, every metric but a GPU's, and few series."""
    watched.wait(lambda: watched.ask('cmtrain_eval_loss{run="job",rank="0",weights="ema"}'))
    (group,) = json.loads((watched.folder / "runs" / ".targets" / "job-0.json").read_text())
    connection = http.client.HTTPConnection(group["targets"][0], timeout=120)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    assert promtool("check", "metrics", input=page) == ""
    series = [line for line in page.splitlines() if not line.startswith("#")]
    assert len(series) <= 150
    served = {re.split(r"[{ ]", line)[0] for line in series}
    absent = {family for family, names in families().items() if not names & served}
    several = "cmtrain_eval_mean_average_precision_ratio"  # of images with several classes
    assert absent == {"cmtrain_gpu_info", "cmtrain_gpu_memory_bytes", several}


@needs_prometheus
def test_a_run_that_ends_takes_its_targets_away_and_leaves_the_other_alone(watched):
    watched.wait(
        lambda: watched.ask('cmtrain_step{run="other"} > 0') and watched.ask('cmtrain_step{run="job"} > 0')
    )
    assert len(watched.ask('up{job="cmtrain"} == 1')) == 3
    watched.other.terminate()
    watched.wait(lambda: len(watched.ask('up{job="cmtrain"}')) == 2)
    watched.wait(lambda: not watched.ask('cmtrain_step{run="other"}'))
    assert len(watched.ask('cmtrain_step{run="job"}')) == 2
    # Between the end of its server and the next look at the folder, a rank seems down: pending, and never
    # firing.
    watched.wait(lambda: not watched.ask('ALERTS{alertname="CmtrainRankDown"}'))


@needs_prometheus
def test_a_killed_rank_is_down_and_its_alert_pending(watched):
    watched.wait(lambda: len(watched.ask('cmtrain_step{run="job"} > 0')) == 2)
    (rank,) = watched.ask('cmtrain_step{run="job",rank="1"}')
    watched.job.processes[1].kill()
    watched.wait(lambda: watched.ask(f'up{{instance="{rank["metric"]["instance"]}"}} == 0'))
    alert = 'ALERTS{alertname="CmtrainRankDown",run="job",rank="1",severity="critical",alertstate="pending"}'
    watched.wait(lambda: watched.ask(alert))
