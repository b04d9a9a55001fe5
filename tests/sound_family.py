"""A stand-in for families whose clips have sound: the tiny Wan2.1, and beside its picture a hum.

The latents of sound are its samples, 25 rows of them a second. The network pulls them towards a tone whose
loudness is the text's. Unless they are isolated, picture and sound change each other. As a script it is
wan_generate_video.py of that family, with guidance for each of the two (`STREAMS`).
"""

import math
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from generation.script_options import ScriptDefaults
from generation.scripts import generation_script
from modules.command import command_line
from protocols.data import Audio, AudioSpec, AudioVideoShapes, Conditions
from protocols.family import Abilities, Family, HearsAudio, NoiseSource
from protocols.requests import Prepared, Request
from protocols.rules import NO_GUIDANCE_RULES, GuidanceRules, StreamGuidance
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section
from wan.family import Wan

RATE, CHANNELS, ROWS = 8000, 2, 25
WIDTH = RATE // ROWS  # samples in a row of latents
TONE = 440.0
STREAMS = GuidanceRules(
    streams=(
        StreamGuidance(perturbed_scale=1.0, modality_scale=3.0, rescale=0.7),
        StreamGuidance(text_scale=7.0, perturbed_scale=1.0, modality_scale=2.0, rescale=0.5),
    ),
    perturbed_blocks=frozenset({1}),
)


def audio_shape(frames: int, fps: float) -> tuple[int, int, int]:
    """C T M of a clip's sound."""
    return CHANNELS, math.ceil(frames / fps * ROWS), WIDTH


def tone(shape: Sequence[int]) -> Tensor:
    """Return the latents C T M of a tone that swells."""
    times = torch.arange(shape[1] * shape[2]) / RATE
    return (torch.sin(2 * math.pi * TONE * times) * (0.2 + times)).view(1, *shape[1:]).expand(*shape)


class Speaker(nn.Module):
    """Both directions; its weight says where it lies."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device), requires_grad=False)


@dataclass(frozen=True)
class AudioWan(Wan):
    """Wan with sound, made by `with_audio`."""

    abilities: ClassVar = Abilities(trains_audio=True, takes_fps=True, detects_few_steps=True)
    audio: AudioSpec | None = AudioSpec(RATE, CHANNELS, audio_shape)
    rules: GuidanceRules = NO_GUIDANCE_RULES
    levels: tuple[float, ...] = ()
    given_audio: Tensor | None = None  # C T M
    diary: list[str] = field(default_factory=list)

    @property
    def audio_identity(self) -> Mapping[str, str]:
        return {"sound": "1"}

    def audio_networks(self, device: torch.device, decodes: bool) -> Speaker:
        self.diary.append("load sound")
        return Speaker(device)

    def encode_audio(self, networks: Speaker, samples: Tensor, frames: int, fps: float) -> Tensor:
        channels, rows, width = audio_shape(frames, fps)
        full = torch.zeros(len(samples), channels, rows * width, device=samples.device)
        count = min(full.shape[2], samples.shape[2])
        full[:, :, :count] = samples[:, :, :count] * networks.scale
        return full.unflatten(2, (rows, width))

    def decode_audio(self, networks: Speaker, latents: Tensor) -> Audio:
        self.diary.append("decode sound")
        return Audio((latents[0].flatten(1) * networks.scale).float(), RATE)

    def media_encoders(self, device: torch.device, images: bool = True) -> Any:
        self.diary.append("load vae")
        return super().media_encoders(device, images)

    def prepare(self, request: Request) -> Prepared:
        prepared = super().prepare(request)
        if self.audio is None or prepared.frames == 1:
            return replace(prepared, rules=self.rules)
        _, *image = self.latent.shape(prepared.frames, prepared.height, prepared.width)
        joint = AudioVideoShapes(tuple(image), self.audio.shape(prepared.frames, prepared.fps))
        return replace(prepared, audio_video_shapes=joint, rules=self.rules, sigmas=self.levels)

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        found = super().sections(prepared, prompts, inputs, noise)
        section, joint = next(found), prepared.audio_video_shapes
        if joint is None:
            return (yield section)
        full = joint.join(section.noise, noise.draw((1, *joint.audio)))
        given = None if self.given_audio is None else self.given_audio[None]
        return (yield replace(section, noise=full, clean_audio=given))

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        joint = overrides.audio_video_shapes
        # what Wan's own network does not know is made here
        plain = replace(
            overrides, audio_video_shapes=None, skip_self_attention=frozenset(), isolate_modalities=False
        )
        if joint is None:
            return super().predict(dit, noisy, timesteps, cond, plain)
        image, audio = joint.split(noisy)
        of_image, of_audio = timesteps.unbind(1) if timesteps.ndim == 2 else (timesteps, timesteps)
        velocity = super().predict(dit, image, of_image, cond, plain)
        velocity = velocity * (1 - 0.2 * len(overrides.skip_self_attention))
        loudness = torch.stack([text.mean() for text in cond["t5"]]).to(noisy).view(-1, 1, 1, 1)
        if not overrides.isolate_modalities:
            loudness = loudness + image.mean(dim=(1, 2, 3, 4)).view(-1, 1, 1, 1) / 10
            velocity = velocity + audio.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1)
        loudness = 0.5 + loudness / 10 - 0.1 * len(overrides.skip_self_attention)
        clean = tone(joint.audio).to(noisy) * loudness
        sigma = (of_audio / 1000).clamp(min=1e-6).view(-1, 1, 1, 1)
        return joint.join(velocity, (audio - clean) / sigma)


def with_audio(family: Wan, **changes: Any) -> AudioWan:
    """Return the family with sound. changes: of the fields of `SoundWan`."""
    given = {one.name: getattr(family, one.name) for one in fields(family) if one.init}
    return AudioWan(**given, **changes)


_: type[Family] = AudioWan
_hears: type[HearsAudio] = AudioWan

main = generation_script("wan", ScriptDefaults(fps=16, has_sound=True), __doc__)


def generate_with_audio(argv: Sequence[object] | None = None, **changes: Any) -> None:
    """Run the script; argv: None: with the words of the command line. changes: as of `with_audio`."""
    from generation.run import generate

    words = None if argv is None else [str(word) for word in argv]
    main(words, make=lambda family, options: generate(with_audio(family, **changes), options))


def tiny_audio_family(words: Sequence[str], **changes: Any) -> AudioWan:
    """Return the family for generation. words: of the models. changes: as of `with_audio`."""
    made: list[AudioWan] = []
    default = ("--save_path", "unused", "--prompt", "x")
    main([*words, *default], make=lambda family, _: made.append(with_audio(family, **changes)))
    return made[0]


if __name__ == "__main__":
    command_line(partial(generate_with_audio, rules=STREAMS))
