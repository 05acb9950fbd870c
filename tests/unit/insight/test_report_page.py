"""The page of a report: its content, and that no text of a run becomes markup."""

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser

from tests.unit.insight.reported import decision, event, make_longer, metrics, steer, write_lines
from ultrathink.insight.report.gathering import gather
from ultrathink.insight.report.markup import clean, figure, short
from ultrathink.insight.report.page import render
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock

VOID = {"meta", "img", "input"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


class Outline(HTMLParser):
    """The elements of a page; complains where they do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def classes(self) -> Iterator[set[str]]:
        for _, attributes in self.elements:
            yield set((attributes.get("class") or "").split())

    def count(self, name: str) -> int:
        return sum(name in found for found in self.classes())


def page_of(run: RunFolder) -> Outline:
    return Outline(render(gather(run)))


def test_the_page_has_all_sections(run: RunFolder) -> None:
    steer(run)
    page = page_of(run)
    sections = {attributes.get("id") for name, attributes in page.elements if name == "section"}
    assert sections >= {
        *("course", "decisions", "events", "experts", "samples", "configuration", "environment")
    }
    for words in (
        *("Bits per byte", "Validation loss", "Training loss", "Tokens", "Training time"),
        *("finished at step 60 of 60", "INITIALIZATION", "rollback", "rule spike"),
        *("confidence 86%", "level 2, medium", "0.003 → 0.0015", "resolved at step 41"),
        *("The loss came back.", "It helped: the interval excludes 0.", "not resolved"),
        *("It hurt: the interval excludes 0.", "the interval includes 0", "by hand"),
        *("4 decisions, 1 of them by hand", "3 decisions audited", "1 alarm among 3 events"),
        *("−0.0120 nats", "[−0.0150, −0.0090]", "training.max_steps", "preset debug"),  # noqa: RUF001
        *("8 experts", "safety", "torch", "data hash", "fp32"),
    ):
        assert words in page.text, words
    assert page.count("band") == 2 * len(gather(run).replay.phases) > 0
    assert page.count("decided") == 4
    # Each on the rail, in the legend and in the table.
    assert (page.count("alarm"), page.count("event")) == (3, 6)
    rows = {attributes.get("id") for name, attributes in page.elements if name == "tr"}
    assert rows >= {"decision-1", "decision-2", "decision-3", "decision-4"}
    links = [a["href"] for name, a in page.elements if name == "a"]
    assert links == [f"#decision-{number}" for number in (1, 2, 3, 4)]
    pictures = [a["src"] or "" for name, a in page.elements if name == "img"]
    assert len(pictures) == 4  # two groups: over steps, and in layers
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    # It loads nothing.
    assert not {"link", "iframe", "object", "embed", "base"} & {name for name, _ in page.elements}
    asked = [a.get(key) or "#" for _, a in page.elements for key in ("src", "href", "action")]
    assert all(place.startswith(("data:", "#")) for place in asked)
    assert "url(" not in render(gather(run))


def test_text_of_a_run_stays_text(run: RunFolder) -> None:
    sample = {"step": 60, "prompt": HOSTILE, "text": HOSTILE + "\x00\ud800</pre>"}
    write_lines(run.path / "samples.jsonl", [sample])
    write_lines(
        run.decisions,
        [
            decision(
                rule=HOSTILE, action=HOSTILE, reasoning=HOSTILE, before=HOSTILE,
                after={"<b>": [HOSTILE]}, signals={HOSTILE: HOSTILE},
                outcome={"resolved": True, "text": HOSTILE},
            )
        ],
    )  # fmt: skip
    write_lines(run.events, [event(30, "high", message=HOSTILE, kind=HOSTILE, subject=HOSTILE)])
    manifest = json.loads(run.manifest.read_text()) | {HOSTILE: HOSTILE}
    run.manifest.write_text(json.dumps(manifest))
    experts = (run.path / "experts.jsonl").read_text()
    (run.path / "experts.jsonl").write_text(experts.replace('"skill"', '"<script>x"'))
    text = render(gather(run))
    page = Outline(text)
    assert [name for name, _ in page.elements].count("script") == 2  # its own
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    assert page.text.count("<script>alert(1)</script>") > 8
    assert "\x00" not in text
    text.encode()  # no half of a surrogate pair


def test_a_run_without_any_of_it(run: RunFolder) -> None:
    for name in ("metrics.jsonl", "experts.jsonl", "samples.jsonl", "segments.jsonl"):
        (run.path / name).unlink()
    for path in (run.manifest, run.events, run.decisions, run.path / "origins.yaml"):
        path.unlink(missing_ok=True)
    page = page_of(run)
    assert "Nothing was logged yet" in page.text
    assert "changed nothing: orchestrator.mode is advise" in page.text
    assert "Load of experts" not in page.text
    assert "manifest.json is missing" in page.text


def test_damage_is_reported(run: RunFolder) -> None:
    for name in ("metrics.jsonl", "experts.jsonl", "samples.jsonl", "decisions.jsonl"):
        with (run.path / name).open("a") as file:
            file.write('{"step": 61, "torn')
    run.manifest.write_text("{")
    (run.path / "segments.jsonl").write_text('{"from_step": 0}\n')
    (run.path / "config.yaml").write_text("training: [")
    text = page_of(run).text
    for words in (
        *("metrics.jsonl: the last line is torn", "experts.jsonl: the last line is torn"),
        *("samples.jsonl: the last line is torn", "decisions.jsonl: the last line is torn"),
        *("manifest.json is damaged", "segments.jsonl is damaged", "config.yaml is damaged"),
    ):
        assert words in text, words


def test_metrics_and_a_configuration_with_little_in_them(run: RunFolder) -> None:
    make_longer(run, 80)
    write_lines(run.metrics, metrics(range(1, 81), loss=None, grad_norm=None))
    page = page_of(run)
    assert "No logged loss is a finite number" in page.text
    assert "Bits per byte" not in page.text
    write_lines(run.metrics, metrics(range(1, 2)))
    for training in ("", "5", "{}"):
        (run.path / "config.yaml").write_text(f"training: {training}\n")
        assert "Training loss" in page_of(run).text


def test_a_short_run_says_what_it_can_show(run: RunFolder) -> None:
    write_lines(run.metrics, metrics(range(1, 5)))
    config = run.path / "config.yaml"
    given = config.read_text()
    for mode, words in (
        ("advise", "With orchestrator.mode=act it reacts to alarms"),
        ("act", "could change this run (orchestrator.mode=act) and had no reason"),
        ("'off'", "The orchestrator was off (orchestrator.mode=off)"),
    ):
        config.write_text(given.replace("mode: advise", f"mode: {mode}"))
        text = page_of(run).text
        assert words in text
        assert "4 logged steps can show that training works" in text
        assert "phases need 32 logged steps" in text
        assert "INITIALIZATION" not in text
    write_lines(run.metrics, metrics(range(1, 61)))
    assert "logged steps can show" not in page_of(run).text


def test_a_run_that_still_trains(run: RunFolder) -> None:
    make_longer(run, 1000)
    write_lines(run.metrics, metrics(range(1, 401)))
    with RunLock.acquire(run):
        text = page_of(run).text
    for words in (
        *("training, at step 400 of 1,000", "400 of 1,000 steps"),
        *("The predicted training loss at step 1,000", "not reached yet"),
    ):
        assert words in text, words


def test_a_run_that_was_resumed(run: RunFolder) -> None:
    path = run.path / "segments.jsonl"
    first = json.loads(path.read_text())
    change = {"key": "training.clip", "before": 1.0, "after": 0.5}
    later = first | {"from_step": 20, "changes": [change], "notes": ["another machine"]}
    write_lines(path, [first, later])
    text = page_of(run).text
    assert "resumed 1 time" in text
    assert "training.clip: 1.0 -> 0.5" in text
    assert "another machine" in text


def test_a_long_run_with_many_events_is_no_huge_page(run: RunFolder) -> None:
    make_longer(run, 20_000)
    write_lines(run.metrics, metrics(range(1, 20_001)))
    acts = [decision(id=n, step=20 * n + 1) for n in range(400)]
    write_lines(run.decisions, acts)
    write_lines(run.events, [event(10 * n + 1, "medium") for n in range(1500)])
    text = render(gather(run))
    assert len(text) < 1_200_000
    page = Outline(text)
    assert page.count("mark") < 400 + 60  # a mark a row, and few above the plot
    assert page.count("alarm") < 400
    assert "and 1,300 more, none more severe" in page.text


def test_figures_and_what_html_may_not_hold() -> None:
    assert clean("a\x07\r\nb\ud83d") == "a\u2407\nb\ufffd"
    values = (1.77421, 25_600.0, 3e-5, 0.0, None, math.nan)
    assert [figure(x) for x in values] == [
        *("1.774", "25,600", "3.00e-5", "0", "\u2013", "not a number")
    ]
    assert [short(x) for x in (0.0015, 3.1e-4, 100.0, 7.1, 1234.0)] == [
        *("0.0015", "3.1e-4", "100", "7.1", "1,234")
    ]
