"""In a step of training or denoising the host never waits for the device: it asks for the next work while
the device still computes.

torch says so of each copy to the host and each number that is read; not of events and streams that are waited
for by name. Training reads the numbers of a step that way, a step later.
"""

import contextlib
import inspect
import json
import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import generation.denoise
import training.loop
from modules.contract.steps import StepDone
from modules.media.reading import Frame, read_image
from modules.seeds import derive_seed
from pocket import drawing
from pocket.clips import pocket_scene, write_dataset
from pocket.concepts import CONCEPTS
from pocket.measure import CLIP, FORMS, POCKET, model_options
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


STEPS = 12
PROMPT = ("--prompt", "a red circle moving left", "--negative_prompt", " ", "--seed", "7", "--cpu_noise")
LOOKS = ("--infer_steps", "10", "--guidance_scale", "3", "--flow_shift", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn clips of a new word and of known things, cached on the CPU, and the transformer in float32."""
    folder = tmp_path_factory.mktemp("pocket")
    (folder / "clips").mkdir()
    for number in range(6):
        make = CONCEPTS["blorp"].make if number % 2 else pocket_scene
        scene, text = make(np.random.default_rng(derive_seed(5, "clip", number)))
        pictures = [Image.fromarray(frame) for frame in drawing.draw(scene)]
        path = folder / "clips" / f"{number}.webp"  # needs no FFmpeg
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=62, lossless=True)
        path.with_suffix(".txt").write_text(text or "a thing", encoding="utf-8")
    dataset = ("--dataset_config", write_dataset(folder, batch_size=2), "--device", "cpu")
    run(folder, CPU, "wan_cache_latents.py", *dataset, "--vae", POCKET / "vae.safetensors")
    run(folder, CPU, "wan_cache_text_encoder_outputs.py", *dataset, "--t5", POCKET / "t5.safetensors")
    write_in_float32(folder)
    return folder


def losses(folder: Path, device: torch.device, *options: object) -> list[float]:
    """The loss of each step of a LoRA's training."""
    models = (*model_options(POCKET), "--dataset_config", "dataset.toml", "--sdpa")
    network = ("--network_module", "networks.lora_wan", "--network_dim", 16, "--network_alpha", 16)
    rate = ("--learning_rate", "3e-3", "--lr_scheduler", "cosine", "--max_train_steps", STEPS)
    times = ("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--max_data_loader_n_workers", 0)
    output = ("--output_dir", "output", "--output_name", device.type, "--seed", 42)
    run(folder, device, "wan_train_network.py", *models, *network, *rate, *times, *output, *options)
    lines = (folder / "output" / f"{device.type}-history.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def video(folder: Path, device: torch.device, output: Path, *options: object) -> Frame:
    """F H W 3, from PNG files; the VAE computes in float32."""
    where = ("--device", device, "--save_path", output, "--output_type", "images", "--vae_dtype", "float32")
    words = (*model_options(POCKET), *CLIP, *PROMPT, *LOOKS, *where, *options)
    run(folder, device, "wan_generate_video.py", *words)
    return np.stack([read_image(path) for path in sorted(output.rglob("*.png"))])


def psnr(ours: Frame, theirs: Frame) -> float:
    """Peak signal to noise ratio in decibels; infinite if they are equal."""
    error = float(np.mean((ours.astype(float) - theirs.astype(float)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


# relative; on the CPU losses in bf16 are up to 0.4 % from float32's, those of fp8 weights 3 % from bf16's
@pytest.mark.parametrize(
    ("options", "bar"),
    [
        ((), 1e-4),
        (("--mixed_precision", "bf16"), 1e-2),
        (("--mixed_precision", "bf16", "--fp8_base", "--fp8_scaled"), 1e-2),
    ],
    ids=["float32", "bf16", "fp8"],
)
def test_the_loss_curve_is_that_of_the_cpu(
    folder: Path, device: torch.device, options: tuple[str, ...], bar: float
) -> None:
    dit = () if options else ("--dit", folder / "dit.safetensors")
    ours, theirs = (losses(folder, where, *dit, *options) for where in (device, CPU))
    assert len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=bar)


# decibels; on the CPU the video of bf16 weights is 51.7 from that of float32
@pytest.mark.parametrize(("dtype", "bar"), [("float32", 55.0), ("bfloat16", 40.0)])
def test_the_video_is_that_of_the_cpu(
    folder: Path, device: torch.device, tmp_path: Path, dtype: str, bar: float
) -> None:
    dit = ("--dit", folder / "dit.safetensors") if dtype == "float32" else ()
    ours, theirs = (
        video(folder, where, tmp_path / name, *dit) for where, name in ((device, "ours"), (CPU, "theirs"))
    )
    assert psnr(ours, theirs) > bar
    seen = look(ours, FORMS)
    assert (seen.shape, seen.colour, seen.direction) == ("circle", "red", "left")
