"""What a FramePack generation is, after features.md, sections 5.1 to 5.7, with the networks of diffusers and
transformers.

Plain loops over the index lines; nothing of ours is imported but the rule for seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import HunyuanVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from modules.seeds import derive_seed
from tests.parity import framepack
from tests.parity.hunyuan import TEMPLATE, text_pipeline
from tests.parity.reference import covering, open_image

WINDOW = 9
Given = dict[str, Tensor]


@dataclass(frozen=True)
class Asked:
    """One video or picture. prompts, images: by section from the video's start."""

    height: int
    width: int
    steps: int
    seed: int
    prompts: Sequence[str]
    images: Sequence[Path]
    end: Path | None = None
    is_f1: bool = False
    paddings: Sequence[int] = ()
    embedded_guidance: float = 10.0
    scale: float = 1.0  # of classifier-free guidance
    negative: str = ""
    rescale: float = 0.0
    flow_shift: float | None = None

    @property
    def sections(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class OneFrame:
    """Places of one picture; coarse: by the name of their tensor."""

    target: int
    clean: Sequence[int]
    has_black: bool  # a black frame behind the controls
    coarse: Mapping[str, Sequence[int]] = field(default_factory=dict)
    controls: Sequence[tuple[Path, Path | None]] = ()  # each with its mask


@dataclass
class Theirs:
    """The networks of a folder that `write_tiny_framepack` has written; in float32 where nothing else is
    said.
    """

    folder: Path
    dit_dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    text_dtype: torch.dtype = torch.float32
    siglip_dtype: torch.dtype = torch.float32
    numbers_dtype: torch.dtype = torch.float32  # what timestep and guidance are rounded to

    @cached_property
    def dit(self) -> torch.nn.Module:
        return framepack.in_diffusers(load_file(self.folder / "dit.safetensors")).to(self.dit_dtype)

    @cached_property
    def encoders(self) -> framepack.Encoders:
        paths = (self.folder / "vae.safetensors", self.folder / "siglip.safetensors")
        return framepack.Encoders(*paths, self.vae_dtype, self.siglip_dtype)

    @cached_property
    def pipe(self) -> HunyuanVideoPipeline:
        """HunyuanVideo's, for its way with prompts."""
        return text_pipeline(self.folder, self.text_dtype)

    @torch.no_grad()
    def text(self, prompt: str, template: Mapping[str, Any] = TEMPLATE) -> Given:
        """Only real tokens, zeros behind them up to 512."""
        states, pooled, mask = self.pipe.encode_prompt(prompt, prompt_template=template)
        real = int(mask.sum())
        rows = states.new_zeros(1, 512, states.shape[2])
        rows[:, :real] = states[:, :real]
        return {
            "llama_vec": rows,
            "llama_attention_mask": torch.arange(512)[None] < real,
            "clip_l_pooler": pooled,
        }

    def latent(self, path: Path, asked: Asked) -> Tensor:
        """1 16 1 h w of an image."""
        image = covering(open_image(path), asked.height, asked.width)
        return self.encoders.latents(
            [image], torch.Generator().manual_seed(derive_seed("posterior", asked.seed))
        )[None]

    def image(self, path: Path, asked: Asked) -> Given:
        """What the image encoder sees."""
        return {
            "image_embeddings": self.encoders.features(covering(open_image(path), asked.height, asked.width))[
                None
            ]
        }


@torch.no_grad()
def video(theirs: Theirs, asked: Asked) -> Tensor:
    """Latents 1 16 F h w."""
    generator = torch.Generator("cpu").manual_seed(asked.seed)
    starts = [theirs.latent(path, asked) for path in asked.images]
    black = torch.zeros_like(starts[0])
    history = [black] * 19  # earliest in the video first
    if asked.is_f1:
        history = [*history, starts[0]]
        order = [(section, 0) for section in range(asked.sections)]
    else:
        if asked.end is not None:
            history[0] = theirs.latent(asked.end, asked)
        paddings = [*asked.paddings, *framepack.default_paddings(asked.sections)[len(asked.paddings) :]]
        order = list(zip(range(asked.sections - 1, -1, -1), paddings[: asked.sections], strict=True))
    for section, padding in order:
        if asked.is_f1:
            seen = [starts[section], history[-1]], history[-3:-1], history[-19:-3]
        else:
            seen = [starts[section], history[0]], history[1:3], history[3:19]
        places = framepack.places_of(WINDOW, None if asked.is_f1 else padding)
        given = theirs.image(asked.images[section], asked)
        given |= {name: torch.tensor([numbers]) for name, numbers in places.items()}
        for name, frames in zip(("", "_2x", "_4x"), seen, strict=True):
            given[f"latents_clean{name}"] = torch.cat(frames, dim=2)
        noise = torch.randn((1, 16, WINDOW, *black.shape[3:]), generator=generator, dtype=torch.float32)
        made = list(sampled(theirs, asked, asked.prompts[section], given, noise).split(1, dim=2))
        history = history + made if asked.is_f1 else made + history
    length = WINDOW * asked.sections + 1
    return torch.cat(history[-length:] if asked.is_f1 else [starts[0], *history][:length], dim=2)


@torch.no_grad()
def picture(theirs: Theirs, asked: Asked, places: OneFrame) -> Tensor:
    """The latent 1 16 1 h w of a single picture."""
    clean = []
    for path, mask in places.controls:
        latent = theirs.latent(path, asked)
        if mask is not None:
            size = (latent.shape[-1], latent.shape[-2])
            small = Image.fromarray(open_image(mask)).convert("L").resize(size, Image.Resampling.LANCZOS)
            latent = latent * torch.from_numpy(numpy.array(small)).float() / 255
        clean.append(latent)
    black = torch.zeros(1, 16, 1, asked.height // 8, asked.width // 8)
    clean = (clean or [black]) + ([black] if places.has_black else [])
    given = {
        **theirs.image(asked.images[0], asked),
        "latent_indices": torch.tensor([[places.target]]),
        "latents_clean": torch.cat(clean, dim=2),
        "clean_latent_indices": torch.tensor([list(places.clean)]),
        **{name: torch.tensor([list(numbers)]) for name, numbers in places.coarse.items()},
    }
    noise = torch.randn(
        black.shape, generator=torch.Generator("cpu").manual_seed(asked.seed), dtype=torch.float32
    )
    return sampled(theirs, asked, asked.prompts[0], given, noise)


def sampled(theirs: Theirs, asked: Asked, prompt: str, given: Given, noise: Tensor) -> Tensor:
    """Clean latents of one run of the sampler."""
    frames, rows, columns = noise.shape[2:]
    tokens = frames * rows * columns / 4
    mu = min(0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256), math.log(7))
    if asked.flow_shift is not None:
        mu = math.log(asked.flow_shift)
    shift = math.exp(mu)
    sigmas = [shift / (shift + 1 / (1 - index / asked.steps) - 1) for index in range(asked.steps)]
    positive = {**theirs.text(prompt), **given}
    negative = positive if asked.scale == 1 else {**theirs.text(asked.negative), **given}
    guidance = torch.tensor([1000 * asked.embedded_guidance]).to(theirs.numbers_dtype).float()

    def clean(noisy: Tensor, sigma: float) -> Tensor:
        def velocity(conditions: Given) -> Tensor:
            timestep = torch.tensor([1000 * sigma]).to(theirs.numbers_dtype).float()
            return framepack.velocity(theirs.dit, noisy, timestep, guidance, conditions)

        found = velocity(positive)
        if asked.scale != 1:
            alone, against = found, velocity(negative)
            found = against + asked.scale * (alone - against)
            axes = tuple(range(1, found.ndim))
            strength = alone.std(axes, keepdim=True) / found.std(axes, keepdim=True)
            found = asked.rescale * found * strength + (1 - asked.rescale) * found
        return noisy - sigma * found

    return unipc(clean, noise, sigmas)


def unipc(clean: Callable[[Tensor, float], Tensor], noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """UniPC, variant bh1, order up to 3, on clean predictions (features.md, section 5.4).

    Returns the last of them.
    """
    maximum = min(3, len(sigmas) - 1)
    x, predictions = noise, [clean(noise, sigmas[0])]
    for step in range(1, len(sigmas)):
        order = min(step, maximum)
        before, now = sigmas[step - 1], sigmas[step]
        h = math.log(before / now)
        last = predictions[-1]
        base = (now / before) * x - math.expm1(-h) * last
        distances = [(math.log(before) - math.log(sigmas[step - 1 - j])) / h for j in range(1, order)] + [1.0]
        slopes = [(predictions[-1 - j] - last) / distances[j - 1] for j in range(1, order)]
        matrix = numpy.array([[distance**power for distance in distances] for power in range(order)])
        phi, right = math.expm1(-h) / -h - 1, []
        for power in range(1, order + 1):
            right.append(phi * math.factorial(power) / -h)
            phi = phi / -h - 1 / math.factorial(power + 1)
        predicted = base
        if order >= 2:
            weights = [0.5] if order == 2 else numpy.linalg.solve(matrix[:-1, :-1], right[:-1]).tolist()
            predicted = base + h * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        newest = clean(predicted, now)
        weights = [0.5] if order == 1 else numpy.linalg.solve(matrix, right).tolist()
        x = base + h * sum(
            weight * slope for weight, slope in zip(weights, [*slopes, newest - last], strict=True)
        )
        predictions.append(newest)
    return predictions[-1]


def frames_of(theirs: Theirs, latents: Tensor, at_once: bool) -> Tensor:
    """Pixels 1 3 F H W in -1..1: two sections at a time, each clip going over into the one that was decoded
    before it.
    """
    vae = framepack.load_vae(theirs.folder / "vae.safetensors").to(theirs.vae_dtype)
    vae.use_framewise_decoding = False

    def decode(part: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.decode((part / framepack.SCALE).to(theirs.vae_dtype)).sample.float()

    if at_once:
        return decode(latents)
    sections, joined = (latents.shape[2] - 1) // WINDOW, None
    starts = [0, *(WINDOW * section + 1 for section in range(1, sections))]
    for section in range(sections - 1, -1, -1):
        length = 2 * WINDOW + (section == 0)
        clip = decode(latents[:, :, starts[section] : starts[section] + length])
        if joined is None:
            joined = clip
            continue
        overlap = 4 * WINDOW - 3
        weights = torch.linspace(1, 0, overlap).view(1, 1, -1, 1, 1)
        seam = weights * clip[:, :, -overlap:] + (1 - weights) * joined[:, :, :overlap]
        joined = torch.cat([clip[:, :, :-overlap], seam, joined[:, :, overlap:]], dim=2)
    assert joined is not None
    return joined
