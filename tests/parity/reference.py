"""What a Wan2.1 generation is, written out with diffusers' pieces after the documented formulas.

Nothing of ours is imported.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn

from tests.parity.theirs import Theirs, pad_text


@dataclass(frozen=True)
class SkippedLayers:
    """Skip-layer guidance: `original` (a third pass) or `uncond` (the second pass skips)."""

    mode: str
    layers: frozenset[int]
    scale: float = 3.0
    start: float = 0.0
    end: float = 0.3


@dataclass(frozen=True)
class Sampling:
    """How noise becomes latents. scales: guidance of each step, None where the prompt is used alone."""

    solver: str = "unipc"
    flow_shift: float = 5.0
    scales: Sequence[float | None] = (5.0,) * 8
    skipped: SkippedLayers | None = None
    formula: str = "cfg"  # cfg, zero star, perpendicular
    weight: float = 0.0  # of the perpendicular negative
    factors: Sequence[float] = ()  # of the velocities of the first steps

    @property
    def steps(self) -> int:
        return len(self.scales)


@dataclass(frozen=True)
class Inputs:
    """What the transformer is given.

    Text: n D; clip: one or two images of 257 rows D; extra: C F h w beside the noisy latents.
    """

    noise: Tensor  # 16 F h w
    positive: Tensor
    negative: Tensor
    clip: Tensor | None = None
    extra: Tensor | None = None
    blank: Tensor | None = None  # of the empty text
    generator: torch.Generator | None = None  # that `noise` was drawn from


def draw_noise(
    seed: int, frames: int, height: int, width: int, generator: torch.Generator | None = None
) -> Tensor:
    """16 F h w float32 for a video of that size in pixels."""
    generator = generator or torch.Generator("cpu").manual_seed(seed)
    return torch.randn(
        (16, (frames - 1) // 4 + 1, height // 8, width // 8), generator=generator, dtype=torch.float32
    )


def schedule(sampling: Sampling) -> tuple[Tensor, list[float]]:
    """Sigmas (N + 1) and what the transformer is fed (N), formats.md section 9."""
    top = 0.999 if sampling.solver == "unipc" else 1.0
    line = numpy.linspace(top, 0, sampling.steps + 1)
    shifted = sampling.flow_shift * line / (1 + (sampling.flow_shift - 1) * line)
    timesteps = [float(sigma * 1000) for sigma in shifted[:-1]]
    if sampling.solver != "vanilla":
        timesteps = [float(int(timestep)) for timestep in timesteps]
    return torch.from_numpy(shifted).float(), timesteps


class ReleasedUniPC(UniPCMultistepScheduler):
    """diffusers' solver on the sigmas of the released code, which end before 0 and not at 1 / 1000."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        sampling = Sampling(flow_shift=self.config.flow_shift, scales=(None,) * num_inference_steps)
        self.sigmas, timesteps = schedule(sampling)
        self.timesteps = torch.tensor(timesteps).long()


KINDS: dict[str, tuple[Any, dict[str, str]]] = {
    "unipc": (UniPCMultistepScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}


class TheirSolver:
    """diffusers' multistep solvers on our sigmas and timesteps; Euler by hand.

    generator: of the noise that a solver adds, after the start was drawn from it.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.is_stochastic = sampling.solver == "dpm++sde"
        self.sigmas, self.timesteps = schedule(sampling)
        self.scheduler: Any = None
        if sampling.solver != "vanilla":
            kind, algorithm = KINDS[sampling.solver]
            settings = {
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "final_sigmas_type": "zero",
            }
            self.scheduler = kind(solver_order=2, **algorithm, **settings)
            self.scheduler.set_timesteps(sampling.steps)
            self.scheduler.sigmas, self.scheduler.timesteps = self.sigmas, torch.tensor(self.timesteps).long()

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        if self.scheduler is None:
            return sample + (self.sigmas[index + 1] - self.sigmas[index]) * velocity
        noise = torch.randn(sample.shape, generator=self.generator) if self.is_stochastic else None
        more = {} if noise is None else {"variance_noise": noise}
        return self.scheduler.step(
            velocity, self.scheduler.timesteps[index], sample, return_dict=False, **more
        )[0]


@contextmanager
def without(dit: WanTransformer3DModel, layers: frozenset[int]) -> Iterator[None]:
    """The transformer as if these blocks were not there."""
    blocks = dit.blocks
    dit.blocks = nn.ModuleList(block for index, block in enumerate(blocks) if index not in layers)
    try:
        yield
    finally:
        dit.blocks = blocks


@torch.no_grad()
def velocity(
    dit: WanTransformer3DModel, noisy: Tensor, timestep: float, text: Tensor, inputs: Inputs
) -> Tensor:
    """One pass: 16 F h w float32.

    What a 16-bit transformer is given is rounded to 16 bits, but for the timestep.
    """
    dtype = dit.patch_embedding.weight.dtype
    given = noisy if inputs.extra is None else torch.cat([noisy, inputs.extra])
    clip = None if inputs.clip is None else inputs.clip.to(dtype)
    return dit(
        given[None].to(dtype), torch.tensor([timestep]), pad_text(text).to(dtype), clip, return_dict=False
    )[0][0].float()


def guided(
    dit: WanTransformer3DModel, noisy: Tensor, timestep: float, step: int, inputs: Inputs, sampling: Sampling
) -> Tensor:
    """The velocity that guidance makes of two or three passes (features.md, sections 3.3, 3.4, 3.8)."""
    scale, skip = sampling.scales[step], sampling.skipped
    positive = velocity(dit, noisy, timestep, inputs.positive, inputs)
    if scale is None:
        return positive
    active = skip is not None and int(skip.start * sampling.steps) <= step < int(skip.end * sampling.steps)
    blank = None if inputs.blank is None else velocity(dit, noisy, timestep, inputs.blank, inputs)
    if skip is None or not active:
        negative = velocity(dit, noisy, timestep, inputs.negative, inputs)
        return combined(positive, negative, blank, scale, sampling)
    with without(dit, skip.layers):
        skipped = velocity(dit, noisy, timestep, inputs.negative, inputs)
    if skip.mode == "uncond":
        return combined(positive, skipped, blank, scale, sampling)
    negative = velocity(dit, noisy, timestep, inputs.negative, inputs)
    return combined(positive, negative, blank, scale, sampling) + skip.scale * (positive - skipped)


def combined(
    positive: Tensor, negative: Tensor, blank: Tensor | None, scale: float, sampling: Sampling
) -> Tensor:
    """One formula of guidance, of a single sample (features.md, sections 6.7 and 6.8), in double precision
    where sums are long.
    """
    if sampling.formula == "cfg":
        return negative + scale * (positive - negative)
    if sampling.formula == "zero star":
        dot = torch.dot(positive.flatten().double(), negative.flatten().double())
        fit = float(dot / (negative.double().norm() ** 2 + 1e-8))
        return fit * negative + scale * (positive - fit * negative)
    assert blank is not None
    wanted, unwanted = (positive - blank).double(), (negative - blank).double()
    share = torch.dot(unwanted.flatten(), wanted.flatten()) / wanted.norm() ** 2
    across = unwanted - share * wanted
    return (blank + scale * (wanted - sampling.weight * across)).float()


def denoise(dit: WanTransformer3DModel, inputs: Inputs, sampling: Sampling) -> Tensor:
    """Clean latents 16 F h w."""
    solver, latents = TheirSolver(sampling, inputs.generator), inputs.noise
    for step, timestep in enumerate(solver.timesteps):
        factor = sampling.factors[step] if step < len(sampling.factors) else 1.0
        latents = solver.step(step, factor * guided(dit, latents, timestep, step, inputs, sampling), latents)
    return latents


# images and control videos


def to_pixels(frames: Sequence[numpy.ndarray]) -> Tensor:
    """H W 3 uint8 each -> 1 3 F H W in -1..1."""
    return (torch.from_numpy(numpy.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1)[None]


def open_image(path: Path) -> numpy.ndarray:
    """H W 3 uint8."""
    return numpy.asarray(Image.open(path).convert("RGB"))


def video_size_for(image: numpy.ndarray, height: int, width: int) -> tuple[int, int]:
    """Height and width of the video that starts with an image: near height * width in area (features.md,
    section 3.5).
    """
    aspect, area = image.shape[0] / image.shape[1], height * width
    sides = (math.sqrt(area * aspect), math.sqrt(area / aspect))
    latent_height, latent_width = (round(side // 8 // 2 * 2) for side in sides)
    return latent_height * 8, latent_width * 8


def stretched(image: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """Resized without regard to aspect: area where the height shrinks, else cubic."""
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method)


def covering(image: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """Scaled to cover and cropped in the middle (formats.md, section 2)."""
    if image.shape[:2] == (height, width):
        return image
    scale = max(width / image.shape[1], height / image.shape[0])
    new_width, new_height = int(image.shape[1] * scale + 0.5), int(image.shape[0] * scale + 0.5)
    if scale > 1:
        resized = numpy.asarray(
            Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS)
        )
    else:
        resized = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_AREA)
    left, top = (new_width - width) // 2, (new_height - height) // 2
    return resized[top : top + height, left : left + width]


def image_condition(theirs: Theirs, first: Tensor, frames: int, end: Tensor | None = None) -> Tensor:
    """4 channels of mask and 16 of latents: image-to-video, with an end image as one more latent frame.
    Images: 1 3 1 H W.
    """
    clip = torch.cat([first, torch.zeros_like(first).repeat(1, 1, frames - 1, 1, 1)], dim=2)
    latents = theirs.encode(clip)[0]
    mask = torch.zeros(4, *latents.shape[1:])
    mask[:, 0] = 1
    if end is not None:
        latents = torch.cat([latents, theirs.encode(end)[0]], dim=1)
        mask = torch.cat([mask, torch.ones(4, 1, *latents.shape[2:])], dim=1)
    return torch.cat([mask, latents])


def first_last_condition(theirs: Theirs, first: Tensor, last: Tensor, frames: int) -> Tensor:
    """The same for flf2v: both images inside one clip; of the last latent frame's mask only the last channel
    is 1.
    """
    middle = torch.zeros_like(first).repeat(1, 1, frames - 2, 1, 1)
    latents = theirs.encode(torch.cat([first, middle, last], dim=2))[0]
    mask = torch.zeros(4, *latents.shape[1:])
    mask[:, 0] = 1
    mask[3, -1] = 1
    return torch.cat([mask, latents])


def control_condition(
    theirs: Theirs, control: Tensor, image_latents: Tensor | None, has_end: bool = False
) -> Tensor:
    """16 channels of control video and 16 of the start image, of which only the first (and an end image's)
    frame stays.
    """
    latents = theirs.encode(control)[0]
    image = torch.zeros_like(latents)
    if image_latents is not None:
        image[:, 0] = image_latents[:, 0]
        if has_end:
            image[:, -1] = image_latents[:, -1]
    return torch.cat([latents, image])


def features_of(theirs: Theirs, *images: numpy.ndarray) -> Tensor:
    """What the image tower makes of one or two images at their own size: each 257 rows D."""
    return torch.cat([theirs.image_features(to_pixels([image])[:, :, 0]) for image in images])


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected magnitude."""
    assert ours.shape == expected.shape, f"{tuple(ours.shape)} instead of {tuple(expected.shape)}"
    return float((ours.float() - expected.float()).abs().max() / expected.float().abs().max())
