"""The live page shows the run, obeys no script but its own, costs little and keeps itself fresh."""

import itertools
import json
import time

import pytest
import torch
from helpers.pages import DOUBLE_IDS, EVIL, OUTSIDE, OVERLAPS, UNNAMED, ParsedPage
from helpers.report_runs import eventful, write_run
from helpers.runs import HANG_SECONDS, free_port

from cmtrain.monitoring.http_server import Exporter
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.monitoring.routes import make_pages
from cmtrain.step.measure import StepReport
from cmtrain.storage.run_record import LAST_BYTES, MAX_PLACES, read_sample, sample_lines

FACTS = {"model": "cmt_ti", "precision": "fp16", "device": "cuda", "world_size": "8", "version": "0.1.0"}
SPEED = {"images_per_second": 12_810.4, "data_wait_ratio": 0.034}


def rank_at(step: int, run: str = "job", rank: int = 0) -> TrainMetrics:
    """Return the metrics of a rank that is at `step` of 20,000."""
    metrics = TrainMetrics(run, rank)
    metrics.start(FACTS, last_step=20_000, flops_per_image=1, device=torch.device("cpu"))
    reach(metrics, step)
    return metrics


def reach(metrics: TrainMetrics, step: int) -> None:
    metrics.count_step(step, num_images=1, num_bytes=1, seconds=0.1, wait_seconds=0.0, phases=[])
    metrics.report(StepReport(step, 4, 2.345, 3.1e-3, 1.9, 65536.0, 3, 0, 9, 3, 0))
    metrics.eta_timestamp.set(time.time() + 7_770)


def page_of(metrics, folder, status=SPEED, stall_seconds=600):
    return make_pages(metrics, lambda: status, stall_seconds, folder)["/"]


def words_of(*arguments, **how) -> str:
    return ParsedPage(page_of(*arguments, **how)().body.decode()).words


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "runs" / "job", events=eventful(), state="running")


@pytest.fixture
def serve():
    servers = []

    def start(route, port=0):
        servers.append(Exporter({"/": route}, "127.0.0.1", port or free_port()))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


# ---- what it shows


def test_it_shows_the_state_of_a_run(folder):
    status = SPEED | {"best_top1": 0.4312, "best_step": 9_000}
    metrics = rank_at(10_000)
    metrics.saved(seconds=1.0, num_bytes=1)
    metrics.saved_at.set(time.time() - 125)
    words = words_of(metrics, folder, status)
    for text in (
        "job training", "cmt_ti \u00b7 fp16 \u00b7 8 GPUs", "50.0 % step 10,000 of 20,000, epoch 5",
        "2h 9m left", "Images per second 12,810 3 % of the time waiting for data",
        "Loss 2.345 at step 10,000", "Learning rate 0.0031",
        "Best top-1 43.1 % at step 9,000", "Last checkpoint 2m 5s ago", "Bad steps 3",
        "4,500 checkpoint path checkpoints/step-000004500", "2,500 rollback", "6,000 checkpoint failed",
        "/metrics", "/status.json", "/-/healthy", "/-/ready",
    ):  # fmt: skip
        assert text in words, text
    assert words.index("7,000 resumed") < words.index("2,500 rollback")  # the newest first
    html = page_of(metrics, folder, status)().body.decode()
    for key in ("loss", "accuracy", "lr", "images_per_second"):
        assert f'id="{key}-title"' in html


@pytest.mark.parametrize(
    ("status", "badge"),
    [
        ({"state": "finished", "step": 20_000}, "finished"),
        ({"state": "finished", "step": 10_000}, "ended by --max-steps"),
        ({"state": "preempted", "step": 10_000}, "preempted"),
        ({"state": "failed", "step": 10_000}, "failed"),
    ],
)
def test_the_end_of_a_run_is_shown_at_once_with_its_report(folder, status, badge):
    shown = SPEED | {"state": "running", "updated": time.time(), "total_steps": 20_000}
    page = make_pages(rank_at(status["step"]), lambda: shown, 600, folder)["/"]
    assert "job training" in ParsedPage(page().body.decode()).words
    shown |= status | {"reason": "top-1 43.1 %", "updated": time.time()}
    words = ParsedPage(page().body.decode()).words
    assert f"job {badge}" in words
    assert f"top-1 43.1 % The report of this run is {folder}/report.html" in words
    assert f"step {status['step']:,} of 20,000" in words
    assert "2h 9m left" not in words


def test_the_end_of_an_earlier_process_is_not_shown(folder):
    status = {"state": "preempted", "updated": time.time() - 60, "reason": "stopped by Ctrl-C"}
    words = words_of(TrainMetrics("job", 0), folder, status)
    assert "job setting up" in words
    assert "Ctrl-C" not in words


def test_a_stalled_run_is_marked(folder):
    metrics = rank_at(10_000)
    metrics.progress_at -= 700
    assert "job stalled" in words_of(metrics, folder)
    assert "No step has finished for 11m 4" in words_of(metrics, folder)  # 40 s, and a few on a busy machine
    metrics.enter("evaluate")
    assert "job evaluating" in words_of(metrics, folder)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe{]\x00,;\n" * 50, b'[1]\n3\n"x"\n{"step": "x"}\n'])
def test_a_folder_without_a_record_costs_no_page(tmp_path, content):
    """As in a run that has just begun, or on a full disk."""
    folder = tmp_path / "job"
    if content is not None:
        folder.mkdir()
        for name in ("log.jsonl", "events.jsonl", "summary.csv"):
            (folder / name).write_bytes(content)
    words = words_of(TrainMetrics("job", 0), folder, {})
    assert "job setting up" in words
    assert "Nothing was logged yet" in words


def test_another_rank_shows_itself_and_names_the_first_one(folder):
    words = words_of(rank_at(10_000, rank=3), folder)
    assert "job rank 3 training" in words
    assert "12,810 3 % of the time waiting for data" in words
    assert "on the page of rank 0" in words
    assert "Curves" not in words


# ---- safety


def hostile(tmp_path):
    """Return a page in which every name from a person or a file is hostile."""
    events = [
        {"time": 1.79e9, "event": EVIL, EVIL: EVIL},
        {"time": 1.79e9, "event": "rollback", "step": 9, "cause": EVIL},
    ]
    run = write_run(tmp_path / "runs" / "job", events=events)
    (run / "summary.csv").write_text(f"step,{EVIL.replace(',', '')},eval_top1\n5,0.5,0.5\n")
    metrics = TrainMetrics(EVIL, 0)
    metrics.start(dict.fromkeys(FACTS, EVIL), last_step=1, flops_per_image=1, device=torch.device("cpu"))
    return page_of(metrics, run, {"images_per_second": EVIL, "best_top1": EVIL})


def test_a_hostile_run_is_shown_and_not_obeyed(tmp_path):
    html = hostile(tmp_path)().body.decode()
    page = ParsedPage(html)
    assert html.count("<script") == 1
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in ("iframe", "object", "embed", "link", "base", "form", "img")
        assert "src" not in attributes
    policy = next(
        attributes for _, attributes in page.tags if "Security" in (attributes.get("http-equiv") or "")
    )
    assert policy["content"].startswith(
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    assert EVIL.replace("\u202e", r"\u202e") in page.text
    assert "49\u202e" not in page.text


def test_no_hostile_script_runs(browser, serve, tmp_path):
    browser.open(serve(hostile(tmp_path)).url, width_px=1280)
    time.sleep(2.5)  # and none in the page that comes in its place
    assert browser.evaluate("typeof hacked") == "undefined"
    assert browser.complaints() == []


# ---- what it costs


def test_it_is_made_once_a_second_for_everybody_and_not_while_nobody_looks(folder, monkeypatch):
    looks = []
    monkeypatch.setattr(
        "cmtrain.storage.run_record.read_sample", lambda *what: looks.append(what) or read_sample(*what)
    )
    page = page_of(rank_at(10_000), folder)
    assert looks == []
    assert len({page().body for _ in range(100)}) == 1
    assert len(looks) == 1
    monkeypatch.setattr("cmtrain.monitoring.routes.MAX_AGE_SECONDS", 0.0)
    page()
    assert len(looks) == 2


DENSE = LAST_BYTES // 201  # lines of the next function


def numbered(path, count):
    path.write_text("".join(f"{number:09d} {'x' * 190}\n" for number in range(count)))
    return [int(line.split()[0]) for line in sample_lines(path)]


def test_a_long_log_is_sampled_evenly_and_a_short_one_read(tmp_path):
    path = tmp_path / "log"
    assert numbered(path, DENSE) == list(range(DENSE))
    for count in (DENSE + 1, 5_000, 20_000, 100_000):
        taken = numbered(path, count)
        assert taken == sorted(set(taken))
        assert taken[-DENSE:] == list(range(count - DENSE, count))
        assert taken[0] == 0
        assert MAX_PLACES // 2 <= len(taken) <= MAX_PLACES + DENSE
        assert max(b - a for a, b in itertools.pairwise(taken)) <= 2 * count / (MAX_PLACES // 2)


def test_the_sample_of_a_growing_log_stays(tmp_path):
    """A curve must not flicker: its points stay, but for the dense end, until the log has doubled."""
    first, second = numbered(tmp_path / "log", 30_000), numbered(tmp_path / "log", 38_000)
    assert set(first[:-DENSE]) <= set(second)


def test_the_end_of_a_file_is_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "events"
    lines = [*(b"%d\n" % number for number in range(1000)), b"cut"]
    path.write_bytes(b"".join(lines))
    assert list(sample_lines(path)) == lines
    for num_bytes, whole in ((10, lines[-2:]), (11, lines[-3:]), (12, lines[-3:])):
        monkeypatch.setattr("cmtrain.storage.run_record.LAST_BYTES", num_bytes)
        taken = list(sample_lines(path))
        assert taken[-len(whole) :] == whole
        assert taken == sorted(set(taken), key=lines.index)
    assert list(sample_lines(tmp_path / "none")) == []


@pytest.mark.parametrize("num_bytes", [1, 100, 3_000])
def test_a_line_longer_than_the_places_are_apart_is_taken_once(tmp_path, num_bytes):
    path = tmp_path / "events"
    lines = [b"%d %s\n" % (number, b"x" * num_bytes) for number in range(300_000 // num_bytes)]
    path.write_bytes(b"".join(lines))
    taken = [int(line.split()[0]) for line in sample_lines(path)]
    assert taken == sorted(set(taken))
    assert num_bytes < 3_000 or len(taken) == len(lines)


# ---- in a browser


@pytest.mark.parametrize("width_px", [1280, 400])
def test_it_looks_right_in_a_browser(browser, serve, tmp_path, width_px):
    """No errors, nothing wider than the window, no overlaps; light and dark, early and late in a run."""
    name = "a-name-of-sixty-four-characters-which-is-the-longest-there-can-be"[:64]
    long = {
        "event": "bad_file",
        "time": 1.79e9,
        "path": "train/" + "very-long-name" * 20,
        "reason": "truncated",
    }
    run = write_run(tmp_path / "runs" / name, num_logs=2_000, events=[*eventful(), long])
    pages = [
        page_of(rank_at(10_000, name), run, SPEED | {"best_top1": 0.4312, "best_step": 9_000}),
        page_of(rank_at(10_000, name, rank=7), run),
        page_of(TrainMetrics(name, 0), tmp_path / "runs" / "none", {}),
    ]
    for page in pages:
        server = serve(page)
        for dark in (False, True):
            browser.open(server.url, width_px=width_px, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width_px
            assert [browser.evaluate(script) for script in (OVERLAPS, OUTSIDE, UNNAMED, DOUBLE_IDS)] == [
                []
            ] * 4
            assert browser.evaluate(
                "[...document.querySelectorAll('.wide')].every(n => n.scrollWidth <= n.clientWidth)"
            )
            background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(16, 20, 24)" if dark else "rgb(255, 255, 255)")
            assert browser.complaints() == []


def test_it_refreshes_itself_and_shows_when_the_run_is_gone(browser, serve, folder):
    metrics = rank_at(10_000)
    page = page_of(metrics, folder)
    server = serve(page)
    browser.open(server.url, width_px=1280)
    shown = "document.querySelector('main').innerText"
    assert "step 10,000 of" in browser.evaluate(shown)
    assert browser.evaluate("getComputedStyle(document.querySelector('.gone')).display") == "none"
    browser.evaluate("document.body.dataset.first = 'yes'")
    reach(metrics, 11_111)
    record = {"step": 11_111, "loss": 1.2345, "lr": 1e-3}
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")
    wait_until(lambda: "step 11,111 of" in browser.evaluate(shown))
    assert "training 1.234" in browser.evaluate(shown).replace("\n", " ")
    assert browser.evaluate("document.title") == "56 % job - cmtrain"
    assert browser.evaluate("document.body.dataset.first") == "yes"  # in place, not loaded again
    # Values are read off the new curves, too.
    box = browser.evaluate(
        "JSON.parse(JSON.stringify(document.querySelector('#lr').getBoundingClientRect()))"
    )
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + box["width"] / 2, y=box["y"] + 20)
    assert browser.evaluate("document.querySelector('figure:has(#lr) .at').textContent").startswith(
        "step 5,"
    )
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.complaints() == []

    server.close()
    wait_until(
        lambda: browser.evaluate("getComputedStyle(document.querySelector('.gone')).display") == "block"
    )
    reach(metrics, 12_000)
    serve(page, server.port)
    wait_until(lambda: "step 12,000 of" in browser.evaluate(shown))
    assert browser.evaluate("getComputedStyle(document.querySelector('.gone')).display") == "none"


def test_the_last_that_a_browser_shows_is_the_end_of_the_run(browser, serve, folder, monkeypatch):
    monkeypatch.setattr("cmtrain.monitoring.http_server.LINGER_SECONDS", 60.0)
    status = SPEED | {"state": "running", "updated": time.time()}
    page = make_pages(rank_at(19_999), lambda: status, 600, folder)["/"]
    server = serve(page)
    browser.open(server.url, width_px=1280)
    status |= {"state": "finished", "reason": "top-1 43.1 %", "updated": time.time()}
    wait_until(lambda: server.asked_at)
    server.linger("/")
    server.close()
    shown = "document.querySelector('main').innerText"
    wait_until(lambda: "finished" in browser.evaluate(shown))
    assert f"The report of this run is {folder}/report.html" in browser.evaluate(shown)
    time.sleep(2.5)  # nobody answers any more, and there is nothing to add
    assert browser.evaluate("getComputedStyle(document.querySelector('.gone')).display") == "none"


def test_a_hidden_page_asks_for_nothing(browser, serve, folder):
    asked = []
    page = page_of(rank_at(10_000), folder)
    browser.open(serve(lambda: asked.append(1) or page()).url, width_px=1280)
    browser.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
    time.sleep(1)  # a request may be on its way
    count = len(asked)
    time.sleep(2.6)
    assert len(asked) == count


def wait_until(condition):
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
