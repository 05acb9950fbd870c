"""Who is told of experts that nobody chooses, when, and how often."""

import json
from dataclasses import replace

import pytest

from tests.unit.monitoring.routed import with_loads
from ultrathink.monitoring.expert_watch import IN_A_ROW, ExpertWatch
from ultrathink.monitoring.experts import ExpertStatistics

ALIVE = with_loads([30.0, 30.0], [30.0, 30.0], num_tokens=60)
DEAD = with_loads([60.0, 0.0], [30.0, 30.0], num_tokens=60)
OTHER_DEAD = with_loads([0.0, 60.0], [30.0, 30.0], num_tokens=60)


def told(watch: ExpertWatch, *steps: ExpertStatistics) -> list[list[str]]:
    return [[text for text, _ in watch.observe(step)] for step in steps]


def test_an_expert_that_is_dead_for_some_steps_is_told_once() -> None:
    *before, last = told(ExpertWatch(), *[DEAD] * IN_A_ROW)
    assert before == [[]] * (IN_A_ROW - 1)
    assert last == [
        "group skill has 1 dead expert (1 in layer 1), without a token at 5 logged steps in a row; "
        "a larger model.moe.balance.load or model.moe.balance.bias_rate spreads tokens more evenly"
    ]


def test_it_is_told_once_for_a_group() -> None:
    watch = ExpertWatch()
    assert sum(map(len, told(watch, *[DEAD] * 20, *[OTHER_DEAD] * 20))) == 1


def test_an_expert_that_comes_back_is_not_dead() -> None:
    steps = [*[DEAD] * (IN_A_ROW - 1), ALIVE] * 3
    assert told(ExpertWatch(), *steps) == [[]] * len(steps)


def test_it_has_to_be_the_same_expert() -> None:
    steps = [DEAD, OTHER_DEAD] * IN_A_ROW
    assert told(ExpertWatch(), *steps) == [[]] * len(steps)


def test_warm_up_and_steps_without_tokens_do_not_count() -> None:
    warm = replace(DEAD, warmup=0.9)
    nothing = with_loads([0.0, 0.0], [0.0, 0.0], num_tokens=0)
    watch = ExpertWatch()
    assert told(watch, *[warm] * 20, *[nothing] * 20) == [[]] * 40
    found = told(watch, *[DEAD, nothing] * IN_A_ROW)
    assert [len(texts) for texts in found] == [0] * 8 + [1, 0]


def test_with_few_tokens_it_takes_longer_to_be_sure() -> None:
    """With one token for each at even loads, five times none is nothing strange."""
    rare = with_loads([2.0, 0.0], num_tokens=2)
    found = told(ExpertWatch(), *[rare] * 30)
    assert [len(texts) for texts in found] == [0] * 19 + [1] + [0] * 10


def test_empty_slots_are_not_dead() -> None:
    empty = replace(DEAD, active=DEAD.load > 0)
    assert told(ExpertWatch(), *[empty] * 20) == [[]] * 20


@pytest.mark.parametrize(
    ("num_dead", "said"),
    [(2, "2 dead experts (1 in layer 1, 2 in layer 1),"), (15, "15 dead experts (of 16 in all")],
)
def test_few_are_named_and_many_are_counted(num_dead: int, said: str) -> None:
    loads = [20.0] * (16 - num_dead) + [0.0] * num_dead
    given = with_loads([loads[0], *loads[:0:-1]], num_tokens=320)
    ((text,),) = [texts for texts in told(ExpertWatch(), *[given] * IN_A_ROW) if texts]
    assert said in text


@pytest.mark.parametrize(("share", "is_told"), [(0.09, False), (0.4, True)])
def test_much_that_is_dropped_is_told_once(share: float, is_told: bool) -> None:
    dropping = replace(ALIVE, dropped=share * ALIVE.load)
    watch = ExpertWatch()
    assert told(watch, *[dropping] * 4, ALIVE, *[dropping] * 4) == [[]] * 9
    found = told(watch, *[dropping] * 20)
    assert found == [
        [
            "40% of what group skill is sent was dropped, and more than 10% at 5 logged steps in a "
            "row; a larger model.moe.routing.capacity_factor, or none, drops less"
        ]
        if is_told and number == 0
        else []
        for number in range(20)
    ]


@pytest.mark.parametrize("done", range(1, 8))
def test_what_it_knows_outlives_a_restart(done: int) -> None:
    steps = [replace(DEAD, dropped=0.5 * DEAD.load)] * 9
    whole = told(ExpertWatch(), *steps)
    first, second = ExpertWatch(), ExpertWatch()
    begun = told(first, *steps[:done])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + told(second, *steps[done:]) == whole
    assert sum(map(len, whole)) == 2


def test_the_state_of_an_older_checkpoint_is_that_of_a_new_run() -> None:
    watch = ExpertWatch()
    watch.load_state_dict({})
    assert watch.state_dict() == ExpertWatch().state_dict()
