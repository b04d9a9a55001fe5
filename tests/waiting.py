"""How long tests wait for what happens sooner or later: no answer of a busy machine is taken for none.

A time that a test demands is measured in processor seconds (`time.process_time`), which other programs hardly
change. `tests/test_conditions.py` finds shorter times to wait.
"""

import time
from collections.abc import Callable

PATIENCE = 300.0  # seconds
MILLISECONDS = 1000  # in a second: Playwright's unit


def wait_for(
    is_true: Callable[[], object],
    told: Callable[[], object] = lambda: "it has not happened",
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until something is true; fail with what `told` returns.

    pause: Lets time pass, in seconds. A page of Playwright needs a way of its own, or its events wait.
    """
    end = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < end, told()
        pause(0.05)
