"""diffusers' pipelines with the weights of tiny checkpoints, and gen_img.py on the same weights."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_lms_discrete
from PIL import Image
from torch import Tensor

import gen_img
from stable_diffusion.assembling import assemble
from stable_diffusion.contract import RequestedImage, StageResult
from stable_diffusion.options import read_gen_img
from tests.tiny.stable_diffusion import tokenizer_folder, write_folder, write_sd1, write_sd2, write_sdxl

SIZE = 64  # pixels
TOLERANCE = 1e-4  # of latents, of their largest value

# by hand, so that ours is compared with something: --sampler -> class, what its file of settings says
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "pndm": ("PNDMScheduler", {"steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {"steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm_2": ("KDPM2DiscreteScheduler", {"steps_offset": 1}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"steps_offset": 1, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


@dataclass(frozen=True)
class Files:
    """A tiny checkpoint in both layouts."""

    kind: str
    single: Path
    folder: Path
    tokenizers: Path

    @property
    def options(self) -> list[str]:
        return ["--ckpt", str(self.single), "--tokenizer_cache_dir", str(self.tokenizers), "--device", "cpu"]


FilesOf = Callable[[str], Files]


def write_files(kind: str, folder: Path, channels: int = 4) -> Files:
    """Write a checkpoint. channels: of the U-Net's input; 9 for inpainting."""
    tokenizers = tokenizer_folder(folder / "tokenizers")
    if kind == "sd1":
        single = write_sd1(folder, channels)
    else:
        single = (write_sd2 if kind == "sd2" else write_sdxl)(folder, in_channels=channels)
    return Files(kind, single, write_folder(kind, folder / "both", in_channels=channels), tokenizers)


@cache
def _parts(files: Files) -> dict[str, Any]:
    """The networks and tokenizers of diffusers' pipeline, loaded once."""
    parts = dict(diffusers.DiffusionPipeline.from_pretrained(files.folder).components)
    parts["unet"].register_to_config(sample_size=SIZE)  # the inpainting pipeline looks at it
    return parts


def pipeline(files: Files, task: str, sampler: str, velocity: bool = False) -> Any:
    """diffusers' pipeline. task: "", "Img2Img" or "Inpaint"."""
    name = f"StableDiffusion{'XL' if files.kind == 'sdxl' else ''}{task}Pipeline"
    made_by = getattr(diffusers, name)
    parts = {**_parts(files), "scheduler": their_scheduler(sampler, velocity)}
    taken = inspect.signature(made_by.__init__).parameters
    parts = {part: value for part, value in parts.items() if part in taken}
    off = ("force_zeros_for_empty_prompt", "requires_safety_checker", "add_watermarker")
    made = made_by(**parts, **{name: False for name in off if name in taken})
    made.set_progress_bar_config(disable=True)
    return made


def their_scheduler(sampler: str, velocity: bool = False, **others: Any) -> Any:
    """The scheduler as diffusers' users write it."""
    name, own = CLASSES[sampler.removeprefix("k_")]
    scheduling_lms_discrete.integrate = SimpleNamespace(quad=_quad)  # in place of SciPy's, if it is missing
    made_by = getattr(scheduling_lms_discrete, name, None) or getattr(diffusers, name)
    return made_by(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if velocity else "epsilon",
        **own,
        **others,
    )


def _quad(function: Any, low: Tensor, high: Tensor, epsrel: float) -> tuple[float, float]:
    """Integrate by Simpson's rule, which is exact for cubic polynomials."""
    a, b = float(low), float(high)
    return (b - a) / 6 * float(function(a) + 4 * function((a + b) / 2) + function(b)), 0.0


def their_pixels(made: Any) -> np.ndarray[Any, Any]:
    """The pictures of a pipeline's result, B H W 3."""
    return np.stack([np.asarray(image) for image in made.images])


def run_script(files: Files, out: Path, *arguments: object) -> np.ndarray[Any, Any]:
    """Run gen_img.py here; its pictures in the order of their names, B H W 3."""
    words = [*files.options, "--outdir", out, "--sequential_file_name", *arguments]
    if "--W" not in arguments:
        words += ["--W", SIZE, "--H", SIZE]
    gen_img.main([str(word) for word in words])
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])


def make_here(files: Files, pictures: Sequence[RequestedImage], *arguments: object) -> StageResult:
    """Make pictures without the script, for their latents."""
    words = [*files.options, "--prompt", "none", *arguments]
    options = read_gen_img(None, [str(word) for word in words])
    return assemble(options, torch.device("cpu")).make(pictures)


def assert_close(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], by: int = 1) -> None:
    """Pictures differ by at most one of 255 anywhere, and are not all gray."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 5
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= by


def generators(*seeds: int) -> list[torch.Generator]:
    """A generator for each picture, on the CPU."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """Write a picture of soft colors."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """Write a black mask with a white box."""
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    mask.save(path)
    return path
