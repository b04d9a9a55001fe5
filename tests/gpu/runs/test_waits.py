"""In a step of training or denoising the host never waits for the device: it asks for the next work while
the device still computes.

torch says so of each copy to the host and each number that is read; not of events and streams that are waited
for by name. Training reads the numbers of a step that way, a step later.
"""

import contextlib
import inspect
import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import generation.denoise
import training.loop
from modules.media.reading import Frame, read_image
from pocket.measure import CLIP, FORMS, POCKET, model_options
from protocols.steps import CompletedStep
from tests.gpu.runs.project import CPU, DEEP, ON_GPU, OTHERS, Project, run
from tests.pocket.detectors import look
from tests.pocket.regression import write_in_float32

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

            def between(_: CompletedStep) -> bool:
                stack.close()
                stack.enter_context(found.noted())
                return False

            call.arguments["watchers"] = (*call.arguments.get("watchers", ()), between)
            return denoise(*call.args, **call.kwargs)

    monkeypatch.setattr(training.loop, "take_step", take)
    monkeypatch.setattr(generation.denoise, "denoise", follow)
    return found


CASES = [*((name, False) for name in (*DEEP, *OTHERS)), *((name, True) for name in DEEP)]
each_way = pytest.mark.parametrize(
    ("name", "saves"), CASES, ids=[f"{name}{' saves memory' * saves}" for name, saves in CASES]
)


@each_way
def test_training_waits_nowhere(
    name: str, saves: bool, project_of: Find, device: torch.device, waits: Waits
) -> None:
    project = project_of(name)
    saving = ("--blocks_to_swap", project.swappable, "--fp8_base", "--fp8_scaled", *CHECKPOINTED)
    project.train(device, "waits", *BF16, *(saving if saves else ()), steps=6)
    assert waits.steps == 6
    assert waits.places == []


@each_way
def test_denoising_waits_nowhere(
    name: str, saves: bool, project_of: Find, device: torch.device, waits: Waits
) -> None:
    project = project_of(name)
    project.generate(
        device, "--infer_steps", "6", *(("--blocks_to_swap", project.swappable) if saves else ())
    )
    assert waits.steps >= 6
    assert waits.places == []


PROMPT = ("--prompt", "a red circle moving left", "--negative_prompt", " ", "--seed", "7", "--cpu_noise")
LOOKS = ("--infer_steps", "10", "--guidance_scale", "3", "--flow_shift", "3")


def video(device: torch.device, output: Path, *options: object) -> Frame:
    """F H W 3, from PNG files; the VAE computes in float32."""
    where = ("--device", device, "--save_path", output, "--output_type", "images", "--vae_dtype", "float32")
    words = (*model_options(POCKET), *CLIP, *PROMPT, *LOOKS, *where, *options)
    run(output.parent, device, "wan_generate_video.py", *words)
    return np.stack([read_image(path) for path in sorted(output.rglob("*.png"))])


def psnr(ours: Frame, theirs: Frame) -> float:
    """Peak signal to noise ratio in decibels; infinite if they are equal."""
    error = float(np.mean((ours.astype(float) - theirs.astype(float)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


# decibels; on the CPU the video of bf16 weights is 51.7 from that of float32
@pytest.mark.parametrize(("dtype", "bar"), [("float32", 55.0), ("bfloat16", 40.0)])
def test_the_video_is_that_of_the_cpu(device: torch.device, tmp_path: Path, dtype: str, bar: float) -> None:
    write_in_float32(tmp_path)
    dit = ("--dit", tmp_path / "dit.safetensors") if dtype == "float32" else ()
    ours, theirs = (
        video(where, tmp_path / name, *dit) for where, name in ((device, "ours"), (CPU, "theirs"))
    )
    assert psnr(ours, theirs) > bar
    seen = look(ours, FORMS)
    assert (seen.shape, seen.colour, seen.direction) == ("circle", "red", "left")
