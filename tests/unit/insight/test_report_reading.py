"""What the report reads of a run: decisions, events, loads, forecasts, settings."""

import json

import numpy as np

from tests.unit.insight.reported import decision, event, make_longer, metrics, write_lines
from ultrathink.insight.events import read_events
from ultrathink.insight.report.gathering import gather
from ultrathink.insight.report.loads import read_loads
from ultrathink.insight.report.settings import changed_settings
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.reading import RunReader


def test_damaged_lines_are_counted_and_left_out(run: RunFolder) -> None:
    lines = [decision(), '{"id": 2, "st', "[1, 2]", decision(id=3, step=None), '{"step": 3}']
    write_lines(run.decisions, [*lines, decision(id=4, step=50)])
    story = gather(run)
    assert [one.id for one in story.decisions] == [1, 4]
    assert story.notes == ["decisions.jsonl: 4 lines are damaged and left out."]


def test_an_event_whose_severity_rose_is_one(run: RunFolder) -> None:
    worse = event(12, "high", began=10, to_step=12, message="worse")
    write_lines(run.events, [event(10, "medium"), worse, event(40, "low"), "torn"])
    reader = RunReader(run)
    found = read_events(reader)
    assert [(e.step, e.to_step, e.severity) for e in found] == [(10, 12, "high"), (40, 40, "low")]
    assert reader.num_damaged == {"events.jsonl": 1}


def test_without_events_of_its_own_a_run_is_judged_by_its_log(run: RunFolder) -> None:
    lines = metrics(range(1, 301))
    for line in lines[200:230]:
        line["loss"] *= 3
    write_lines(run.metrics, lines)
    run.events.unlink(missing_ok=True)
    assert gather(run).saw_every_step  # detectors watched and found nothing
    assert not gather(run).events
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("mode: advise", "mode: 'off'"))
    story = gather(run)
    assert not story.saw_every_step
    assert any(one.is_alarm and 195 < one.step < 215 for one in story.events)


def test_loads_are_those_of_the_file(run: RunFolder) -> None:
    groups = read_loads(RunReader(run))
    assert [(group.name, group.num_experts) for group in groups] == [("skill", 8), ("safety", 4)]
    skill = groups[0]
    rows = [json.loads(line) for line in (run.path / "experts.jsonl").read_text().splitlines()]
    assert skill.course.shape == (60, 8)
    late = sum(np.array(row["groups"]["skill"]["load"], float) for row in rows[-6:])
    np.testing.assert_allclose(skill.late, late)
    first = np.array(rows[0]["groups"]["skill"]["load"], float)
    np.testing.assert_allclose(skill.course[0], (first / first.mean(1, keepdims=True)).mean(0))
    assert skill.gini == max(rows[-1]["groups"]["skill"]["gini"])


def test_loads_with_empty_slots_and_of_steps_that_were_undone(run: RunFolder) -> None:
    def line(step: int, *load: list[int | None]) -> dict[str, object]:
        return {"step": step, "layers": [0, 2], "groups": {"a": {"load": list(load)}}}

    lines = [line(1, [4, 4, None], [0, 8, None]), line(2, [99, 0, None], [99, 0, None])]
    lines += [line(2, [3, 3, 6], [0, 4, None])]
    write_lines(run.path / "experts.jsonl", [*lines, '{"step": 5}', "torn"])
    reader = RunReader(run)
    [group] = read_loads(reader)
    assert reader.num_damaged == {"experts.jsonl": 2}
    np.testing.assert_allclose(group.course, [[0.5, 1.5, 0], [0.375, 1.375, 1.5]])
    assert group.course_active.tolist() == [[True, True, False], [True, True, True]]
    assert group.late.tolist() == [[3, 3, 6], [0, 4, 0]]
    assert (group.num_dead, group.num_experts, group.gini) == (1, 3, None)


def test_forecasts_use_only_earlier_steps(run: RunFolder) -> None:
    make_longer(run, 1000)
    write_lines(run.metrics, metrics(range(1, 1001)))
    healthy = gather(run).replay
    assert [one.share for one in healthy.predicted] == [0.25, 0.5, 0.75]
    assert [one.is_inside for one in healthy.predicted] == [True] * 3
    for one in healthy.predicted:
        assert 0.9 * one.share * 1000 < one.forecast.at_step <= one.share * 1000
        assert one.forecast.step == 1000
    # Another end changes the actual loss, and no earlier forecast.
    write_lines(run.metrics, [*metrics(range(1, 801)), *metrics(range(801, 1001), loss=9.0)])
    broken = gather(run).replay
    assert [one.forecast for one in broken.predicted] == [one.forecast for one in healthy.predicted]
    assert [one.is_inside for one in broken.predicted] == [False] * 3
    assert broken.predicted[0].came == 9.0
    write_lines(run.metrics, metrics(range(1, 601)))  # not at its end
    found = gather(run).replay
    nothing = [(one.share, one.came, one.is_inside) for one in found.predicted]
    assert nothing == [(0.25, None, None), (0.5, None, None)]
    assert found.forecast is not None
    assert found.forecast.step == 1000


def test_what_a_rollback_undid_is_kept_apart(run: RunFolder) -> None:
    undone_lines = metrics(range(201, 241), loss=8.0)
    lines = [*metrics(range(1, 201)), *undone_lines, *metrics(range(201, 301))]
    write_lines(run.metrics, lines)
    story = gather(run)
    assert story.curves["loss"].values.max() < 6
    assert len(story.train) == 300
    (undone,) = story.replay.undone
    assert (undone[0][0], undone[-1]) == (200, (240, 8.0))


def test_settings_are_those_that_were_set(run: RunFolder) -> None:
    found = {one.key: one for one in gather(run).changed}
    steps = found["training.max_steps"]
    assert (steps.value, steps.origin) == (60, "override")
    assert found["model.hidden_size"].origin == "preset debug"
    assert found["model.moe.groups"].value[0]["name"] == "skill"
    assert found["tokenizer.type"].default == "bpe"
    assert "training.seed" not in found
    assert "model.vocab_size" not in found  # derived
    assert "training.clip" not in found  # a default
    tree = {"training": {"clip": 1.0, "log_every": 3, "optimizer": {"type": "mine", "zeal": 2}}}
    unknown = {one.key: one.value for one in changed_settings(tree, None)}  # without origins
    assert unknown["training.log_every"] == 3
    assert unknown["training.optimizer.zeal"] == 2
    assert "training.clip" not in unknown
