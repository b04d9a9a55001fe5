from training.reports.logs import PAUSE, SEEN, StepClock


def clock_after(count: int = SEEN + 1, seconds: float = 1.0) -> StepClock:
    """A clock that has seen steps of that length; the first of them does not count."""
    clock = StepClock()
    for step in range(1, count + 1):
        assert clock.note(step, seconds) is None
    return clock


def test_a_step_of_more_than_twice_the_median_is_told_with_its_causes() -> None:
    clock = clock_after()
    assert clock.note(20, 2.0) is None  # twice is not more than twice
    line = clock.note(21, 3.0)
    assert line is not None
    assert "Step 21 took 3.00 s; 1.00 s are usual for steps with items of this size" in line


def test_a_step_is_compared_with_steps_of_its_size_and_not_below_a_second() -> None:
    clock = clock_after()
    for step in range(20, 20 + SEEN):
        assert clock.note(step, 9.0, "large") is None
    assert clock.note(40, 10.0, "large") is None
    assert clock.note(41, 30.0, "large") is not None
    assert clock_after(seconds=0.01).note(20, 0.9) is None


def test_it_is_told_once_in_a_while_only() -> None:
    clock = clock_after()
    assert clock.note(20, 9.0) is not None
    assert clock.note(21, 9.0) is None
    assert clock.note(20 + PAUSE, 9.0) is not None


def test_a_step_with_saving_or_sampling_before_it_does_not_count() -> None:
    clock = clock_after()
    clock.skip()
    assert clock.note(20, 100.0) is None
    assert clock.note(21, 3.0) is not None
