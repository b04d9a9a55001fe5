"""In a step of training or denoising the host never waits for the device: it asks for the next work while
the device still computes.

torch says so of each copy to the host and each number that is read; not of events and streams that are waited
for by name. Training reads the numbers of a step that way, a step later.
"""

import contextlib
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import generation.denoise
import training.loop
from modules.contract.steps import StepDone
from tests.gpu.runs.project import DEEP, ON_GPU, OTHERS, Project

pytestmark = ON_GPU

Find = Callable[[str], Project]
ROOT = Path(__file__).resolve().parents[3]
WARM = 2  # steps in which tables of positions and the like are made
BF16 = ("--mixed_precision", "bf16")
CHECKPOINTED = ("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload")


class Waits:
    """Where the host waited: the innermost line of ours for each, while it is switched on."""

    def __init__(self, device: torch.device) -> None:
        self.places: list[str] = []
        self.steps = 0
        self._device = device

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what happens inside the block, if it is not one of the first steps."""
        self.steps += 1
        if self.steps <= WARM or self._device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = self._note
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _note(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            frames = [frame for frame in traceback.extract_stack() if not _sees(frame.filename)]
            ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
            last = (ours or frames)[-1]
            self.places.append(f"{last.filename}:{last.lineno} {last.line}")


def _sees(file: str) -> bool:
    """Whether a file notes waits, so that none of its lines waits."""
    return bool({Path(__file__).name, "emulated_cuda"} & set(Path(file).parts))


@pytest.fixture
def waits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Steps of training and of denoising are watched."""
    found = Waits(device)
    take_step, denoise = training.loop.take_step, generation.denoise.denoise

    def take(*arguments: Any) -> Any:
        with found.noted():
            return take_step(*arguments)

    def follow(*arguments: Any, **named: Any) -> Any:
        call = inspect.signature(denoise).bind(*arguments, **named)
        with contextlib.ExitStack() as stack:

            def between(_: StepDone) -> bool:
                stack.close()
                stack.enter_context(found.noted())
                return False

            call.arguments["watchers"] = (*call.arguments.get("watchers", ()), between)
            return denoise(*call.args, **call.kwargs)

    monkeypatch.setattr(training.loop, "take_step", take)
    monkeypatch.setattr(generation.denoise, "denoise", follow)
    return found


@pytest.mark.parametrize("name", [*DEEP, *OTHERS])
def test_training_waits_nowhere(name: str, project_of: Find, device: torch.device, waits: Waits) -> None:
    project_of(name).train(device, "waits", *BF16, steps=5)
    assert waits.steps == 5
    assert waits.places == []


@pytest.mark.parametrize("name", DEEP)
def test_training_that_saves_memory_waits_nowhere(
    name: str, project_of: Find, device: torch.device, waits: Waits
) -> None:
    project = project_of(name)
    swap = ("--blocks_to_swap", project.swappable, "--fp8_base", "--fp8_scaled")
    project.train(device, "waits", *BF16, *CHECKPOINTED, *swap, steps=6)
    assert waits.steps == 6
    assert waits.places == []


@pytest.mark.parametrize("name", [*DEEP, *OTHERS])
@pytest.mark.parametrize("swaps", [False, True], ids=["kept", "swapped"])
def test_denoising_waits_nowhere(
    name: str, swaps: bool, project_of: Find, device: torch.device, waits: Waits
) -> None:
    project = project_of(name)
    if swaps and name not in DEEP:
        pytest.skip("it has too few blocks")
    swap = ("--blocks_to_swap", project.swappable) if swaps else ()
    project.generate(device, "--infer_steps", "6", *swap)
    assert waits.steps >= 6
    assert waits.places == []
