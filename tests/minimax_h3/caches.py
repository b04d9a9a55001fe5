"""Caches of clips for a training of MiniMax-H3, with random numbers: what the caching scripts write."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny.language_models import DIM

FRAMES = 22  # 17n + 5
CHANNELS, AUDIO_CHANNELS = 24, 32
SOUND = 37  # latents of so many frames
HEADER = """[general]
resolution = [64, 32]
batch_size = {batch_size}

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [{frames}]
{more}
"""
IMAGES = """[general]
resolution = [64, 32]

[[datasets]]
image_directory = "pictures"
cache_directory = "cache"
"""


@dataclass(frozen=True)
class Clip:
    """What the caches hold of a clip, without batch dimension."""

    latents: Tensor  # 24 F h w
    audio: Tensor  # 32 2 A
    text: Tensor  # n D
    tags: Tensor  # n
    is_heard: bool = True
    media: dict[str, Tensor] = field(default_factory=dict)  # keyframes and references, by name
    rows: dict[str, Tensor] = field(default_factory=dict)  # of teachers, by name


def random_clip(
    seed: int,
    is_heard: bool = True,
    frames: int = FRAMES,
    rows: int = 5,
    has_images: bool = False,
    sides: tuple[int, int] = (2, 4),
) -> Clip:
    """rows: of the text. has_images: whether its first ones stand for pictures. sides: of the latents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latent_frames, audios = (1, 2) if frames == 1 else (frames // 17 * 5 + 2, SOUND)
    tags = torch.ones(rows, dtype=torch.long)
    if has_images:
        tags[1:3] = 0
    return Clip(
        draw(CHANNELS, latent_frames, *sides),
        audio=draw(AUDIO_CHANNELS, 2, audios),
        text=draw(rows, DIM),
        tags=tags,
        is_heard=is_heard,
    )


def write_caches(
    folder: Path, clips: dict[str, Clip], batch_size: int = 1, more: str = "", frames: int = FRAMES
) -> None:
    """Write caches of clips, and dataset.toml. clips: by the names of their sources. more: of the table."""
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for name, clip in clips.items():
        count, height, width = clip.latents.shape[1:]
        tensors = {
            f"latents_{count}x{height}x{width}_float32": clip.latents,
            "latents_audio_float32": clip.audio,
            "audio_present_float32": torch.tensor(float(clip.is_heard)),
        }
        for key, tensor in clip.media.items():
            sizes = "" if key.endswith("audio") else f"_{'x'.join(map(str, tensor.shape[-3:]))}"
            tensors[f"{key}{sizes}_float32"] = tensor
        span = "" if frames == 1 else f"_00000-{frames:03d}"
        save_file(tensors, cache / f"{name}{span}_0064x0032_mmh3.safetensors")
        write_text(cache / f"{name}_mmh3_te.safetensors", clip.text, clip.tags, rows=clip.rows)
    table = IMAGES if frames == 1 else HEADER.format(batch_size=batch_size, frames=frames, more=more)
    (folder / "dataset.toml").write_text(table, encoding="utf-8")


def write_text(path: Path, states: Tensor, tags: Tensor, rows: dict[str, Tensor] | None = None) -> None:
    """Write the cache of a text. rows: further ones, of teachers, by name."""
    tensors = {"mmh3_hidden_states": states, "mmh3_token_tags": tags, **(rows or {})}
    named = {}
    for key, tensor in tensors.items():
        dtype = "int64" if key.endswith("tags") else "float32"
        named[f"varlen_{key}_{dtype}"] = tensor
    save_file(named, path)


def write_empty_text(folder: Path) -> Tensor:
    """Write the empty prompt's cache. Returns its states."""
    states = torch.randn(1, DIM, generator=torch.Generator().manual_seed(99))
    write_text(folder / "cache" / "mmh3_te.empty.safetensors", states, torch.ones(1, dtype=torch.long))
    return states
