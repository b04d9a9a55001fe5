"""Stand-ins for FramePack's networks: what they are given is written down."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frame_pack.family import FramePack
from frame_pack.files import FramePackFiles
from frame_pack.requests import FramePackRequest
from generation.denoise import make_latents
from protocols.data import Conditions
from protocols.requests import Prepared, Request
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides
from tests.golden_cases import read_case
from tests.preparing import prepare

CPU = torch.device("cpu")
HEIGHT, WIDTH = 2, 4  # of latents


@dataclass
class Call:
    """One forward pass: positional arguments by name, and the history."""

    noisy: Tensor
    timesteps: Tensor
    llama: Tensor
    guidance: Tensor
    image: Tensor
    indices: Tensor
    history: dict[str, Tensor]

    def places(self, name: str) -> list[int]:
        """Of the clean frames of a kind, none where they are not there."""
        found = self.history.get(name)
        return [] if found is None else found[0].tolist()


class RecordingDit(nn.Module):
    """In one Euler step a section becomes the number of its call, from 1, in every place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        llama: Tensor,
        llama_mask: Tensor,
        clip_l: Tensor,
        guidance: Tensor,
        image_embeddings: Tensor,
        latent_indices: Tensor,
        overrides: Overrides = NO_OVERRIDES,
        **history: Tensor,
    ) -> Tensor:
        call = Call(noisy, timesteps, llama, guidance, image_embeddings, latent_indices, history)
        self.calls.append(call)
        return noisy - len(self.calls)


class RepeatingVae(nn.Module):
    """The first latent frame is one frame, each other four; a picture of 8 x 8 pixels for each latent
    pixel.
    """

    device, dtype = CPU, torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        for chunk in self.decode_unclamped(latents):
            yield chunk.clamp(-1, 1)

    def decode_unclamped(self, latents: Tensor) -> Iterator[Tensor]:
        self.lengths.append(latents.shape[2])
        pixels = latents[:, :1].repeat(1, 3, 1, 1, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)
        for index, frame in enumerate(pixels.split(1, dim=2)):
            yield frame if index == 0 else frame.repeat_interleave(4, 2)


def family(**settings: Any) -> FramePack:
    """A family without files."""
    return FramePack(FramePackFiles(), **settings)


def request(frames: int, **settings: Any) -> Prepared:
    """A prepared request of the stubs' size, made in one step of Euler's."""
    default = {"guidance_scale": 1.0, "embedded_guidance": 10.0, "flow_shift": 3.0, "steps": 1}
    asked = Request("a cat", 7, 8 * WIDTH, 8 * HEIGHT, frames, solver="euler", **{**default, **settings})
    return replace(prepare(asked), family_settings=FramePackRequest((Path("start.png"),), None))


def texts(value: float) -> EncodedPrompts:
    """What the text encoders make of a prompt."""
    encoded: Conditions = {
        "llama_vec": torch.full((3, 2), value),
        "llama_attention_mask": torch.ones(3, dtype=torch.bool),
        "clip_l_pooler": torch.zeros(2),
    }
    return EncodedPrompts(encoded)


def plain(value: float, frames: int = 1) -> Tensor:
    """Latents of one value."""
    return torch.full((1, 16, frames, HEIGHT, WIDTH), value)


def images(sections: int) -> dict[int, Conditions]:
    """What every section is given, each its own image."""
    return {
        index: {
            "image_embeddings": torch.full((1, 4, 2), float(index)),
            "start_latents": plain(100.0 + index),
        }
        for index in range(sections)
    }


def make(model: FramePack, asked: Prepared, inputs: dict[int, Conditions]) -> tuple[Tensor, list[Call]]:
    """Denoise with a recording transformer: the latents, and its calls."""
    dit = RecordingDit()
    prompts = {index: texts(float(index)) for index in inputs}
    latents = make_latents(model, lambda _: dit, asked, prompts, inputs, CPU)
    return latents, dit.calls


def golden_videos() -> list[dict[str, Any]]:
    """The section tables of the recorded system."""
    return read_case("framepack_schedule")[0]["sections"]
