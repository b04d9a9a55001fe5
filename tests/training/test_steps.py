"""Which micro-batches form which optimizer step."""

import pytest

from training.steps import StepPlan


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    plan = StepPlan(num_batches=7, processes=2, accumulation=2, total_steps=100)

    assert list(plan.groups(0)) == [range(0, 4), range(4, 7)]
    assert plan.steps_per_epoch == 2


def test_two_processes_take_the_steps_of_one_with_twice_the_accumulation() -> None:
    two, one = StepPlan(7, 2, 2, 5), StepPlan(7, 1, 4, 5)

    for group in two.groups(0):
        assert sorted(two.share(group, 0) + two.share(group, 1)) == one.share(group, 0)
    assert [list(two.groups(epoch)) for epoch in range(3)] == [list(one.groups(epoch)) for epoch in range(3)]


@pytest.mark.parametrize("position", [0, 4, 7])
def test_groups_after_a_resume_are_the_rest_of_the_epoch(position: int) -> None:
    plan = StepPlan(7, 1, 4, 100)

    assert list(plan.groups(0, position)) == [group for group in plan.groups(0) if group.start >= position]


def test_the_run_ends_at_its_total_in_the_middle_of_an_epoch() -> None:
    plan = StepPlan(num_batches=6, processes=1, accumulation=2, total_steps=4)

    assert plan.num_epochs == 2
    assert list(plan.groups(1)) == [range(0, 2)]
    assert list(plan.keys(0, 0, 2)) == [(0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1)]
    assert list(plan.groups(1, 2)) == []


@pytest.mark.parametrize("begin", [(0, 0, 0), (2, 0, 9), (1, 3, 5), (1, 7, 5)])
def test_steps_are_counted_from_where_the_plan_began(begin: tuple[int, int, int]) -> None:
    epoch, position, step = begin
    plan = StepPlan(7, 1, 4, 30, *begin)

    for number in range(epoch, plan.num_epochs):
        for group in plan.groups(number, position):
            assert plan.steps_until(number, position) == step
            step, position = step + 1, group.stop
        position = 0
    assert step == plan.total_steps
