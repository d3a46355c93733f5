"""Take the screenshots in this folder: `python docs/screenshots.py`, with Chromium installed.

It trains the demo, which takes a minute, and takes the live page during the run and the report after it.
docs/prometheus.png is Prometheus' own graph of a run, and is not made here.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))
from helpers.browser import Browser  # noqa: E402 - the tests' browser

WIDTH_PX = 1280
MAX_BYTES = 120_000
SHARE_DONE = 0.6  # of the run, when the live page is taken


def take(browser: Browser, page: Path | str, target: Path, height_px: int | None = None) -> None:
    """Save the first `height_px` of `page`, or all of it, as a PNG with a palette: a third of the size."""
    browser.open(page, width_px=WIDTH_PX)
    browser.screenshot(target, height_px)
    with Image.open(target) as shot:
        small = shot.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(target, optimize=True)
    assert target.stat().st_size <= MAX_BYTES, f"{target}: {target.stat().st_size} bytes"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, browser = Path(folder) / "runs" / "demo", Browser(Path(folder) / "profile")
        training = subprocess.Popen(
            [sys.executable, "-m", "cmtrain", "demo"], cwd=folder, stdout=subprocess.DEVNULL
        )
        try:
            status: dict = {}
            while not status.get("step", 0) > SHARE_DONE * status.get("last_step", 0):
                assert training.poll() is None, "the demo ended too early"
                time.sleep(0.2)
                if (run / "status.json").exists():
                    status = json.loads((run / "status.json").read_text())
            take(browser, status["metrics_url"].removesuffix("metrics"), DOCS / "live.png")
            assert training.wait() == 0
            take(browser, run / "report.html", DOCS / "report.png", 1180)
        finally:
            training.kill()
            browser.close()


if __name__ == "__main__":
    main()
