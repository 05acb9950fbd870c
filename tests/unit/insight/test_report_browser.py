"""The page in a browser: it draws without messages or requests, and the pointer reads values."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.unit.insight.reported import make_longer, metrics, steer, write_lines
from ultrathink.insight.report.gathering import gather
from ultrathink.insight.report.page import render
from ultrathink.runs.folder import RunFolder

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Without a window, and with frames whose content the page around them may read.
FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
    "hide-scrollbars", "allow-file-access-from-files", "enable-logging=stderr",
    "virtual-time-budget=20000", "dump-dom",
)  # fmt: skip
FRAMES = {  # of a page around: the width of each, and the logged steps' distance in it
    "desk": (1280, 1, ""),
    "phone": (390, 1, ""),
    "long": (1280, 1000, ""),
    "long on a phone": (390, 1000, ""),
    "without its script": (1280, 1, 'sandbox="allow-same-origin"'),
}
LOOK = """
const overlaps = (doc) => [".c-loss .steps span", ".c-loss .plot .y", ".lanes .mark", ".tile dd"]
  .flatMap((kind) => {
    const boxes = [...doc.querySelectorAll(kind)]
      .map((e) => [e.textContent, e.getBoundingClientRect()]).filter(([, b]) => b.width);
    return boxes.flatMap(([s, a], i) => boxes.slice(i + 1).filter(([, b]) =>
      a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
      .map(([t]) => [kind, s, t]));
  });
const look = (frame) => {
  const doc = frame.contentDocument, view = frame.contentWindow;
  const one = (selector) => doc.querySelector(selector);
  const width = (selector) => one(selector).getBoundingClientRect().width;
  const shown = () => ["linear", "log"].filter(
    (kind) => view.getComputedStyle(one(`.c-loss .s-${kind}`)).display !== "none");
  const tip = doc.getElementById("tip"), plot = one(".c-loss .plot");
  const before = [tip.hidden, shown()], box = plot.getBoundingClientRect();
  const lines = [".l-raw", ".l-smooth", ".l-val"].map((line) => [
    width(`.s-linear ${line}`), one(`.s-linear ${line}`).getTotalLength()]);
  one("label[for=log]").click();
  const middle = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
  plot.dispatchEvent(new view.PointerEvent("pointermove", middle));
  const read = tip.hidden ? "" : tip.innerText;
  plot.dispatchEvent(new view.PointerEvent("pointerleave"));
  return {
    title: doc.title, sample: one("pre.sample").innerText,
    before, read, after: [tip.hidden, shown()], lines,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    plot: width(".c-loss .plot"), page: doc.documentElement.scrollWidth,
    images: [...doc.images].map((image) => image.complete && image.naturalWidth > 3),
    paper: view.getComputedStyle(doc.body).backgroundColor, overlaps: overlaps(doc),
    decisions: doc.querySelectorAll(".decisions tbody tr").length,
  };
};
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => [frame.id, look(frame)]);
  document.getElementById("found").textContent = JSON.stringify(Object.fromEntries(found));
};
"""


def write_page(run: RunFolder, stride: int) -> str:
    """The page of a run of which 600 steps were logged, with four decisions and three events."""
    make_longer(run, 600 * stride)
    lines = metrics(range(stride, 600 * stride + 1, stride))
    lines += [
        {"step": s * stride, "split": "val", "time": 1e9 + s, "loss": 2.2, "bits_per_byte": 2.1}
        for s in (200, 400, 600)
    ]
    write_lines(run.metrics, sorted(lines, key=lambda line: (line["step"], line["split"])))
    write_lines(run.path / "samples.jsonl", [{"step": 60, "prompt": "a", "text": HOSTILE}])
    steer(run)
    return render(gather(run))


@pytest.fixture(scope="module")
def around(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a frame for each case."""
    folder = tmp_path_factory.mktemp("pages")
    for stride in (1, 1000):
        run = RunFolder(Path(shutil.copytree(trained_run, folder / f"{stride}" / "small")))
        (folder / f"{stride}.html").write_text(write_page(run, stride), encoding="utf-8")
    frames = "".join(
        f'<iframe id="{name}" src="{stride}.html" width="{width}" height="900" {how}></iframe>'
        for name, (width, stride, how) in FRAMES.items()
    )
    text = f'<!DOCTYPE html>{frames}<pre id="found"></pre><script>{LOOK}</script>'
    (folder / "around.html").write_text(text, encoding="utf-8")
    return folder / "around.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_drawn_and_read(around: Path, tmp_path: Path, dark: bool) -> None:
    named = os.environ.get("ULTRATHINK_BROWSER")
    program = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed; name one in ULTRATHINK_BROWSER")
    flags = [*FLAGS, f"user-data-dir={tmp_path}", f"blink-settings=preferredColorScheme={1 - dark}"]
    command = [program, *(f"--{flag}" for flag in flags), around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-500:]
    assert match[1], done.stderr
    found: dict[str, dict[str, Any]] = json.loads(unescape(match[1]))
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert [one for one in complaints if "frame is sandboxed" not in one] == []
    for name, (width, _, _) in FRAMES.items():
        one = found[name]
        assert one["requests"] == []
        assert one["title"] == "small: training report"
        assert one["sample"] == f"a{HOSTILE}"
        assert (one["paper"] == "rgb(255, 255, 255)") is not dark
        # Drawn, as large as they should be, and without labels on each other.
        assert 0.8 * min(width, 1120) < one["plot"] <= width
        for drawn, length in one["lines"]:
            assert drawn == pytest.approx(one["plot"], abs=0.7 * one["plot"])
            assert length > 100
        assert one["images"] == [True] * 4
        assert one["page"] <= width  # nothing sticks out at the side
        assert one["overlaps"] == []
        assert one["decisions"] == 4
        assert one["before"] == [True, ["linear"]]
        assert one["after"] == [True, ["log"]]
    shown = found["desk"]["read"]
    losses = {line["step"]: line["loss"] for line in metrics(range(295, 306))}
    step = int(shown.split("step ")[1].split()[0])  # 300 or 301
    assert f"{losses[step]:.4g}" in shown
    assert "learning rate\t0.001" in shown
    assert "validation loss" in shown
    assert found["without its script"]["read"] == ""
