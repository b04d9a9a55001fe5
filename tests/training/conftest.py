"""accelerate keeps its state for the life of a process; every test here begins without one, on the CPU."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, PartialState


@pytest.fixture(autouse=True)
def _fresh_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
