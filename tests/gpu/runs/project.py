"""Projects of tiny models, and the runs of their command lines inside this process, on a device.

Clips are lossless animations: no machine needs FFmpeg for them. Caches are made on the CPU once, so that runs
on two devices start from the same bytes.
"""

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny.families import FAMILIES, TinyFamily, write_deep
from tests.tiny.project import write_animations, write_dataset, write_image
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit

CPU = torch.device("cpu")
TEST_DEVICE = "REELSMITH_TEST_DEVICE"  # environment variable: where to run instead of CUDA
OUTPUT = ("--seed", "1", "--max_data_loader_n_workers", "0", "--output_dir", "output", "--output_name")
SIZE = ("--video_size", "32", "32", "--infer_steps", "3", "--guidance_scale", "3", "--seed", "7")
ON_GPU = pytest.mark.gpu(unless=TEST_DEVICE)
EXPERTS = "wan t2v-A14B"
# of which all but the last have blocks enough to swap
DEEP = (
    *("wan t2v-1.3B", EXPERTS, "hunyuan_video", "framepack", "flux", "hunyuan_image", "lumina"),
    *("flux_3", "qwen_image_21", "moss_image"),
)
OTHERS = ("wan i2v-14B", "wan ti2v-5B", "skyreels i2v", "framepack one frame", "chroma")
TWO_LISTS = {"hunyuan_video", "framepack", "hunyuan_image", "flux", "flux_3"}  # of blocks, or more


@dataclass(frozen=True)
class Trained:
    """What a training has left: the loss of each step, and the tensors of its file."""

    losses: list[float]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Project:
    """A folder with a model, its caches, and the commands of its family."""

    family: TinyFamily
    folder: Path

    @property
    def swappable(self) -> int:
        """The most blocks that can be swapped."""
        maximum = {"z_image": 2}
        return maximum.get(self.family.name, 4 if self.family.name in TWO_LISTS else 3)

    def run(self, device: torch.device, script: str, *arguments: object) -> None:
        run(self.folder, device, script, *arguments)

    def train(
        self, device: torch.device, name: str, *arguments: object, steps: int = 4, whole: bool = False
    ) -> Trained:
        """Train a LoRA, or with `whole` the transformer itself."""
        command = self.family.train
        if whole:
            command = [self.family.train_full, *command[1 : command.index("--network_module")]]
        rate = ("--learning_rate", "1e-3")
        self.run(device, *command, *rate, *OUTPUT, name, "--max_train_steps", steps, *arguments)
        return read_trained(self.folder / "output", name)

    def generate(self, device: torch.device, *arguments: object) -> Tensor:
        """Generate latents with a prompt that needs no package to be cleaned, from noise of the CPU."""
        return latents_in(self.make(device, "--output_type", "latent", *arguments))

    def make(self, device: torch.device, *arguments: object) -> Path:
        """Generate what the arguments say; return the new folder of the results."""
        words = ("--prompt", "a cat", "--negative_prompt", "dull", *SIZE, *self.noise)
        return self.decode(device, *words, *arguments)

    def decode(self, device: torch.device, *arguments: object) -> Path:
        """Run the family's script for generation; return the new folder of the results."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.run(device, *self.family.generate, "--device", device, "--save_path", folder, *arguments)
        return folder

    @property
    def noise(self) -> tuple[str, ...]:
        """The option that draws noise on the CPU, unless the family does so anyway."""
        is_drawn = self.family.name.startswith(("framepack", "hunyuan_image"))
        return () if is_drawn else ("--cpu_noise",)


def read_trained(output: Path, name: str) -> Trained:
    """Return what a training of this name has left in its output folder."""
    lines = (output / f"{name}-history.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return Trained([row["loss"] for row in rows], load_file(output / f"{name}.safetensors"))


def latents_in(folder: Path) -> Tensor:
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


def run(folder: Path, device: torch.device, script: str, *arguments: object) -> None:
    """Run a root script in this process; training computes on the device too, which has no option for it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps it for the life of a process
    with as_program(folder, device):
        importlib.import_module(script.removesuffix(".py")).main([str(word) for word in arguments])
    AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def as_program(folder: Path, device: torch.device) -> Iterator[None]:
    """Stand in a folder, with the environment of a program that computes on a device."""
    environment = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}
    with patch.dict(os.environ, environment), contextlib.chdir(folder):
        yield


def two_experts() -> TinyFamily:
    """Wan 2.2 with its two transformers, made of Wan 2.1's commands."""
    one = next(each for each in FAMILIES if each.name == "wan t2v-1.3B")

    def prepare(folder: Path, clips: object) -> None:
        write_tiny_wan(folder / "model", experts=2)
        write_dit(folder / "model", tiny_state("t2v", seed=9, num_layers=4), name="dit_high")
        write_animations(folder / "clips")
        write_dataset(folder)
        write_image(folder / "start.png", 32, 32)

    def with_both(command: list[str]) -> list[str]:
        words = ["t2v-A14B" if word == "t2v-1.3B" else word for word in command]
        place = words.index("--dit")
        return [*words[:place], "--dit_high_noise", "model/dit_high.safetensors", *words[place:]]

    return replace(
        one, name=EXPERTS, prepare=prepare, train=with_both(one.train), generate=with_both(one.generate)
    )


def write_project(name: str, folder: Path) -> Project:
    """Write a family's models and clips, and its caches."""
    family = two_experts() if name == EXPERTS else next(each for each in FAMILIES if each.name == name)
    if name in DEEP:
        write_deep(family, folder, write_animations)
    else:
        family.prepare(folder, write_animations)
    project = Project(family, folder)
    for command in (family.cache_latents, family.cache_texts):
        project.run(CPU, *command, "--device", "cpu")
    return project
