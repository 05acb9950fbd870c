"""The page in a browser: it draws without messages or requests, and the pointer reads values."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.insight.chromium import Browser, find_browser
from tests.unit.insight.reported import make_longer, metrics, steer, write_lines
from ultrathink.insight.report.gathering import gather
from ultrathink.insight.report.page import render
from ultrathink.runs.folder import RunFolder

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
WIDTH_OF = "Math.round(document.querySelector({!r}).getBoundingClientRect().width)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed; name one in ULTRATHINK_BROWSER")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(run: RunFolder) -> Path:
    """The page of a run of 600 steps with four decisions and three events."""
    return write_page(run, 1)


def write_page(run: RunFolder, stride: int) -> Path:
    """The page of a run of which 600 steps were logged, each so many after the one before."""
    make_longer(run, 600 * stride)
    lines = metrics(range(stride, 600 * stride + 1, stride))
    lines += [
        {"step": s * stride, "split": "val", "time": 1e9 + s, "loss": 2.2, "bits_per_byte": 2.1}
        for s in (200, 400, 600)
    ]
    write_lines(run.metrics, sorted(lines, key=lambda line: (line["step"], line["split"])))
    write_lines(run.path / "samples.jsonl", [{"step": 60, "prompt": "a", "text": HOSTILE}])
    steer(run)
    path = run.path / "report.html"
    path.write_text(render(gather(run)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (390, False), (1280, True)], ids=["desk", "phone", "dark"]
)
def test_all_is_drawn_without_messages_or_requests(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.messages.clear()
    browser.open(page, width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.evaluate("document.title") == "small: training report"
    assert browser.evaluate("document.querySelector('pre.sample').innerText") == f"a{HOSTILE}"
    # Drawn, and as large as they should be.
    plot = browser.evaluate(WIDTH_OF.format(".c-loss .plot"))
    assert 0.8 * min(width, 1120) < plot <= width
    for line in (".s-linear .l-raw", ".s-linear .l-smooth", ".s-linear .l-val"):
        assert browser.evaluate(WIDTH_OF.format(line)) == pytest.approx(plot, abs=0.7 * plot)
        assert browser.evaluate(f"document.querySelector({line!r}).getTotalLength()") > 100
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 3)")
    # Nothing sticks out at the side.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    ink = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ink == "rgb(255, 255, 255)") is not dark


@pytest.mark.parametrize("stride", [1, 1000])
@pytest.mark.parametrize("width", [1280, 390])
def test_labels_do_not_lie_on_each_other(
    browser: Browser, run: RunFolder, width: int, stride: int
) -> None:
    browser.open(write_page(run, stride), width=width)
    overlaps = browser.evaluate("""(() => {
      const found = [];
      for (const kind of [".c-loss .steps span", ".c-loss .plot .y", ".lanes .mark", ".tile dd"]) {
        const boxes = [...document.querySelectorAll(kind)]
          .map((e) => [e.textContent, e.getBoundingClientRect()]).filter(([, b]) => b.width);
        boxes.forEach(([s, a], i) => boxes.slice(i + 1).forEach(([t, b]) => {
          if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
            found.push([kind, s, t]);
        }));
      }
      return found;
    })()""")
    assert overlaps == []


def test_the_scale_is_switched(browser: Browser, page: Path) -> None:
    browser.open(page)
    display = "getComputedStyle(document.querySelector('.c-loss .s-{}')).display"
    assert browser.evaluate(display.format("linear")) != "none"
    assert browser.evaluate(display.format("log")) == "none"
    browser.evaluate("document.querySelector('label[for=log]').click()")
    assert browser.evaluate(display.format("log")) != "none"
    assert browser.evaluate(display.format("linear")) == "none"


def test_the_pointer_reads_values(browser: Browser, page: Path) -> None:
    browser.open(page)
    box = browser.evaluate("""(() => {
      const plot = document.querySelector(".c-loss .plot");
      plot.scrollIntoView({block: "center", behavior: "instant"});
      const b = plot.getBoundingClientRect();
      return [b.left, b.top, b.width, b.height];
    })()""")
    assert browser.evaluate("document.getElementById('tip').hidden")
    browser.point(box[0] + 0.5 * box[2], box[1] + 0.7 * box[3])
    shown = browser.evaluate("document.getElementById('tip').innerText")
    assert "step 30" in shown  # 300 or 301
    assert "learning rate\t0.001" in shown
    assert "validation loss" in shown
    losses = {line["step"]: line["loss"] for line in metrics(range(295, 306))}
    step = int(shown.split("step ")[1].split()[0])
    assert f"{losses[step]:.4g}" in shown
    browser.point(2, 2)
    assert browser.evaluate("document.getElementById('tip').hidden")


def test_the_page_is_whole_without_its_script(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        document = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        for selector, least in ((".s-linear .l-smooth", 1), (".decisions tbody tr", 4)):
            found = browser.call("DOM.querySelectorAll", nodeId=document, selector=selector)
            assert len(found["nodeIds"]) >= least
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
