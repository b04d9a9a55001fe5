"""Run the generation scripts of all families on tiny models, and see each call of the network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fpack_generate_video
import hv_generate_video
import wan_generate_video
from protocols.data import Conditions
from protocols.steps import NO_OVERRIDES, Overrides
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.project import write_image
from tests.tiny.wan import write_tiny_wan

STEPS = 4
SIZE = ("--video_size", "32", "32", "--infer_steps", str(STEPS), "--device", "cpu", "--output_type", "latent")
SAY = ("--prompt", "a cat", "--negative_prompt", "dull", "--seed", "1", "--guidance_scale", "3")


@dataclass(frozen=True)
class Call:
    """A call of the network."""

    step: int
    rows: int  # passes in one batch
    skipped: frozenset[int]
    embedded: bool


Made = tuple[dict[int, Tensor], list[Call]]  # latents by their seed, calls of the network


@dataclass
class Watched:
    """A family that notes the calls of its network."""

    family: Any
    calls: list[Call] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        assert overrides.step_position is not None
        self.calls.append(
            Call(overrides.step_position.step, len(noisy), overrides.skip_blocks, overrides.embedded_guidance)
        )
        return self.family.predict(dit, noisy, timesteps, cond, overrides)


def latents_in(folder: Path) -> dict[int, Tensor]:
    """Return the latents that a run left, by seed."""
    paths = folder.glob("*_latent.safetensors")
    return {int(path.name.split("_")[1]): load_file(path)["latent"] for path in paths}


@dataclass(frozen=True)
class Script:
    """A family's script with its models on disk."""

    main: Callable[..., None]
    words: Sequence[object]  # name the models and what each video needs

    def run(self, folder: Path, *arguments: object, say: Sequence[str] = SAY) -> Made:
        """Make what the arguments ask for."""
        from generation.run import generate

        calls: list[Call] = []
        self.main(
            [str(word) for word in ("--save_path", folder, *SIZE, *self.words, *say, *arguments)],
            make=lambda family, options: generate(Watched(family, calls), options),
        )
        return latents_in(folder), calls

    def latents(self, folder: Path, *arguments: object) -> Tensor:
        """Return the latents of a single video."""
        (made,) = self.run(folder, *arguments)[0].values()
        return made

    def made(self, folder: Path, *arguments: object) -> dict[int, Tensor]:
        """Make what the arguments ask for as a user does, and return the latents that are left."""
        self.main([str(word) for word in ("--save_path", folder, *SIZE, *self.words, *arguments)])
        return latents_in(folder)

    def one(self, folder: Path, *arguments: object) -> Tensor:
        """Return the latents of a single video that is made as a user does."""
        (made,) = self.made(folder, *arguments).values()
        return made


def write_scripts(folder: Path) -> dict[str, Script]:
    """Write tiny models of every kind that guidance could treat in its own way."""
    write_image(folder / "start.png", 32, 32)
    image, length = ("--image_path", str(folder / "start.png")), ("--video_length", "5")
    wan = {kind: write_tiny_wan(folder / kind, kind) for kind in ("t2v", "i2v")}
    experts = write_tiny_wan(folder / "experts", experts=2)
    hunyuan = {kind: write_tiny_hunyuan(folder / f"hunyuan {kind}", kind) for kind in ("t2v", "i2v")}
    framepack = write_tiny_framepack(folder / "framepack")
    wan_main, hunyuan_main = wan_generate_video.main, hv_generate_video.main
    window = ("--latent_window_size", "1", "--video_sections", "1")
    return {
        "wan": Script(wan_main, [*wan["t2v"].models, "--task", "t2v-1.3B", *length]),
        "wan i2v": Script(wan_main, [*wan["i2v"].models, "--task", "i2v-14B", *image, *length]),
        "wan A14B": Script(wan_main, [*experts.models, "--task", "t2v-A14B", "--flow_shift", "5", *length]),
        "hunyuan": Script(hunyuan_main, [*hunyuan["t2v"].models, *length]),
        "skyreels i2v": Script(hunyuan_main, [*hunyuan["i2v"].models, *image, *length]),
        "framepack": Script(fpack_generate_video.main, [*framepack.models, *image, *window]),
    }


def per_step(calls: Sequence[Call]) -> list[int]:
    """Return the number of passes of each step."""
    return [sum(call.rows for call in calls if call.step == step) for step in range(STEPS)]


def is_finite(latents: dict[int, Tensor]) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in latents.values())
