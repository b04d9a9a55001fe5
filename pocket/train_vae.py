"""Train the pocket VAE, in its own short loop: frames, then clips, then the decoder alone.

Called by pocket/train.py. When the encoder has stopped learning its latents are final: they can be cached
while the decoder still learns.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from checkpoints.writing import save_tensors
from modules.atomic_write import atomic_path
from modules.media.pixels import to_pixels
from modules.media.reading import video_frames
from modules.seeds import derive_seed
from pocket import drawing, vae_learning
from pocket.muon import Muon
from pocket.vae_learning import decode, encode
from wan.vae import WanVae
from wan.vae_blocks import VaeLayer, WanVaeConfig

logger = logging.getLogger(__name__)

WIDTH = 16  # base width; the levels have 1, 2, 4 and 4 times as many channels
# added to latents of standard deviation 1: makes the decoder tolerate small errors of a transformer
NOISE = 0.1
REAL = 0.35  # share of real footage in a batch
HELD_OUT = 33  # number of first frames of each real clip that are never trained on
SCALES = (64, 88)  # short sides of the real frames from which 64 x 64 pieces are cut


@dataclass(frozen=True)
class LearningPhase:
    """One phase of the training.

    Batches are (clips, frames, side in pixels), used in turn; the learning rate falls as a cosine.
    """

    name: str
    steps: int
    batches: tuple[tuple[int, int, int], ...]
    first_rate: float
    last_rate: float
    learns_encoder: bool = True


PHASES = (
    LearningPhase("frames", 900, ((24, 1, 32),), 1.2e-3, 8e-4),
    LearningPhase("clips", 700, ((8, 5, 32), (6, 9, 32), (24, 1, 32), (2, 9, 64)), 8e-4, 1e-4),
    LearningPhase("decoder", 800, ((6, 9, 32), (2, 9, 64), (1, 17, 64)), 5e-4, 1e-5, learns_encoder=False),
)


def config(width: int = WIDTH) -> WanVaeConfig:
    """Return the released structure with one residual block per level (two in the decoder)."""
    widths = [width, width, 2 * width, 4 * width, 4 * width]
    down, up = [], []
    for level, kind in enumerate(("spatial", "temporal", "temporal", None)):
        down.append(VaeLayer("residual", widths[level], widths[level + 1]))
        down += [VaeLayer(kind, widths[level + 1], widths[level + 1])] if kind else []
    for level, kind in enumerate(("temporal", "temporal", "spatial", None)):
        wide = widths[4 - level]
        first = wide if level == 0 else widths[5 - level] // 2
        up += [VaeLayer("residual", first, wide), VaeLayer("residual", wide, wide)]
        up += [VaeLayer(kind, wide, wide // 2)] if kind else []
    return WanVaeConfig(16, tuple(down), tuple(up))


def train(
    folder: Path,
    clips: Mapping[str, Path],
    phases: tuple[LearningPhase, ...] = PHASES,
    seed: int = 0,
    every: int = 200,
    statistics_clips: int = 300,
) -> Path:
    """Train from nothing or resume from `folder`/vae_state.pt; return the path of the final vae.safetensors.

    All files are in `folder`. `clips` are real footage. `encoder_final.safetensors` is written when the
    encoder has stopped learning. `every` is the number of steps between states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = WanVae(config())
    vae_learning.begin(vae)
    optimizer = Muon(vae.parameters())
    source = ClipSource(clips, seed)
    state_path, step = folder / "vae_state.pt", 0
    if state_path.exists():
        state = torch.load(state_path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    total = sum(phase.steps for phase in phases)
    while step < total:
        phase, position = _phase_at(phases, step)
        if not phase.learns_encoder and position == 0:
            finish_encoder(vae, statistics_clips)
            save_tensors(folder / "encoder_final.safetensors", _half(vae))
            optimizer = Muon(vae.parameters())
        loss = _step(
            vae,
            optimizer,
            phase,
            position,
            source.batch(step, *phase.batches[position % len(phase.batches)]),
            step,
        )
        step += 1
        if step % every == 0 or step == total:
            quality = measure(vae, source)
            logger.info(
                "%s %d/%d loss %.4f %s",
                phase.name,
                step,
                total,
                loss,
                " ".join(f"{k} {v:.1f}" for k, v in quality.items()),
            )
            with atomic_path(state_path) as temporary:
                torch.save(
                    {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary
                )
            save_tensors(folder / "vae.safetensors", _half(vae))
    return folder / "vae.safetensors"


class ClipSource:
    """Training batches by step: drawn clips and pieces of real footage, in -1..1."""

    def __init__(self, clips: Mapping[str, Path], seed: int) -> None:
        self._seed = seed
        self.held_out: dict[str, NDArray[np.uint8]] = {}
        self._real: list[NDArray[np.uint8]] = []
        for name, path in clips.items():
            frames = list(video_frames(path))
            self.held_out[name] = np.stack(
                [fit_frame(frame, 64)[:64, :64] for frame in _middle(frames[: drawing.FRAMES])]
            )
            self._real += [
                np.stack([fit_frame(frame, side) for frame in frames[HELD_OUT:]]) for side in SCALES
            ]

    def batch(self, step: int, clips: int, frames: int, side: int) -> Tensor:
        """Return the batch of a step, B 3 F H W with H = W = side. It does not depend on earlier calls."""
        random = np.random.default_rng(derive_seed(self._seed, "vae batch", step))
        return as_pixels(np.stack([self._clip(random, frames, side) for _ in range(clips)]))

    def _clip(self, random: np.random.Generator, frames: int, side: int) -> NDArray[np.uint8]:
        if self._real and random.uniform() < REAL:
            full = self._real[random.integers(len(self._real))]
            first = random.integers(len(full) - frames + 1)
            top, left = (random.integers(size - side + 1) for size in full.shape[1:3])
            piece = full[first : first + frames, top : top + side, left : left + side]
            return piece[:, :, ::-1] if random.uniform() < 0.5 else piece
        scene, start = any_scene(random), int(random.integers(drawing.FRAMES - frames + 1))
        middle = scene.things[0].center(start + frames // 2)  # so that the piece shows part of the thing
        left, top = (
            int(np.clip(place - side / 2 + random.uniform(-16, 16), 0, drawing.SIZE - side))
            for place in middle
        )
        return drawing.draw(scene, start, frames)[:, top : top + side, left : left + side]


def any_scene(random: np.random.Generator) -> drawing.Scene:
    """Draw a scene, half of the time with any colors and forms, beyond those of the captions.

    So the VAE can show what a LoRA is to teach.
    """
    scene = drawing.scene(random, two=0.3)
    if random.uniform() < 0.5:
        return scene
    things = []
    for each in scene.things:
        color = tuple(random.integers(0, 256, 3).tolist())
        form = drawing.pick(random, drawing.FORMS)
        things.append(
            drawing.Thing(
                each.colour,
                form,
                each.direction,
                each.speed,
                each.width,
                color,
                each.pixels,
                each.start,
                each.velocity,
            )
        )
    ground = tuple(random.integers(0, 256, 3).tolist()) if random.uniform() < 0.3 else scene.ground_rgb
    return drawing.Scene(tuple(things), scene.ground, ground)


def finish_encoder(vae: WanVae, clips: int = 300) -> None:
    """Freeze the encoder after scaling the latents of drawn clips to mean 0 and standard deviation 1."""
    random = np.random.default_rng(derive_seed("latent statistics"))
    with torch.no_grad():
        latents = [
            encode(vae, as_pixels(drawing.draw(drawing.scene(random, two=0.1))[None])) for _ in range(clips)
        ]
    values = torch.cat(latents).transpose(0, 1).flatten(1)
    vae_learning.fold_statistics(vae, values.mean(1), values.std(1))
    for part in (vae.encoder, vae.conv1):
        part.requires_grad_(False)


@torch.no_grad()
def measure(vae: WanVae, source: ClipSource) -> dict[str, float]:
    """Return the PSNR in dB of held-out drawn and real clips."""
    random = np.random.default_rng(derive_seed("held-out clips"))
    drawn = as_pixels(np.stack([drawing.draw(drawing.scene(random, two=0.1)) for _ in range(12)]))
    figures = {"drawn": psnr(drawn, decode(vae, encode(vae, drawn)))}
    for name, clip in source.held_out.items():
        pixels = as_pixels(clip[None])
        figures[name] = psnr(pixels, decode(vae, encode(vae, pixels)))
    return figures


def psnr(pixels: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of all clips together; pixels in -1..1."""
    error = (pixels - other.clamp(-1, 1)).square().mean().item()
    return 10 * math.log10(4 / max(error, 1e-12))


def as_pixels(clips: NDArray[np.uint8]) -> Tensor:
    """Convert B F H W 3 uint8 to B 3 F H W float32 in -1..1."""
    return to_pixels(torch.from_numpy(clips))


def fit_frame(frame: NDArray[np.uint8], short_side: int) -> NDArray[np.uint8]:
    """Shrink the frame until its short side has `short_side` pixels."""
    height, width = frame.shape[:2]
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def _middle(frames: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Return the middle square of each frame."""
    side = min(frames[0].shape[:2])
    top, left = ((size - side) // 2 for size in frames[0].shape[:2])
    return [frame[top : top + side, left : left + side] for frame in frames]


def _phase_at(phases: tuple[LearningPhase, ...], step: int) -> tuple[LearningPhase, int]:
    for phase in phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError("after the last phase")


def _step(
    vae: WanVae,
    optimizer: torch.optim.Optimizer,
    phase: LearningPhase,
    position: int,
    pixels: Tensor,
    step: int,
) -> float:
    fall = 0.5 + 0.5 * math.cos(math.pi * position / phase.steps)
    warm = min(1.0, (position + 1) / 50)
    for group in optimizer.param_groups:
        group["lr"] = warm * (phase.last_rate + (phase.first_rate - phase.last_rate) * fall)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(phase.learns_encoder):
            means = encode(vae, pixels)
        channels = means.transpose(0, 1).flatten(1)  # Z B*f*h*w
        scale = 1.0 if phase.learns_encoder else channels.std(1).view(1, -1, 1, 1, 1)
        generator = torch.Generator().manual_seed(derive_seed("latent noise", step))
        result = decode(vae, means + NOISE * scale * torch.randn(means.shape, generator=generator))
    error = result - pixels
    loss = error.abs().mean() + error.square().mean()
    if phase.learns_encoder:  # keep each channel near mean 0 and deviation 1, the scale of NOISE
        loss = (
            loss + 0.01 * (channels.mean(1).square() + channels.std(1).clamp_min(1e-3).log().square()).mean()
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _half(vae: WanVae) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float16) for name, tensor in vae.state_dict().items()}
