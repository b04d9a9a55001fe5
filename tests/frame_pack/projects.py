"""Folders with models and caches to train on, and the two ways to a sample: while training, and by the
generation script.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from frame_pack.family import family_for_training
from frame_pack.options import FramePackTrainingOptions
from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from networks.adapter import make_network
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, TinyFamily
from tests.training.watched import Watched
from training.options import TrainingOptions, read_arguments, training_parser
from training.samples import prepare_samples

CPU = torch.device("cpu")
OUTPUT = ("--output_name", "lora", "--seed", "1", "--max_data_loader_n_workers", "0")
SIZE = ("--video_size", "32", "32", "--infer_steps", "2", "--guidance_scale", "3")


def family_named(name: str) -> TinyFamily:
    return next(family for family in FAMILIES if family.name == name)


def write_project(folder: Path, family: TinyFamily) -> Path:
    """Models, media and caches."""
    family.prepare(folder)
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    return folder


def train(
    folder: Path, family: TinyFamily, output: Path, *arguments: object, steps: int = 1
) -> tuple[dict[str, Tensor], str]:
    """The tensors of the LoRA, and what was said."""
    said = succeed_here(
        *family.train, *OUTPUT, "--output_dir", output, "--max_train_steps", steps, *arguments, folder=folder
    )
    return load_file(output / "lora.safetensors"), said


def sample_latents(tiny: TinyFamily, lora: Path, lines: str, folder: Path) -> list[Tensor]:
    """What a training that continues a LoRA would show at its next samples: 1 16 F h w each.

    For in the project's folder.
    """
    parser = training_parser("")
    add_options(parser, FramePackTrainingOptions)
    args = read_arguments(
        parser, [*tiny.train[1:], "--output_dir", str(folder), *OUTPUT, "--network_weights", str(lora)]
    )
    options, family = (
        read_options(TrainingOptions, args),
        Watched(family_for_training(read_options(FramePackTrainingOptions, args))),
    )
    (folder / "prompts.txt").write_text(f"{lines}\n", encoding="utf-8")
    sampler = prepare_samples(family, folder / "prompts.txt", folder / "sample", "lora", CPU, 0, 1)  # type: ignore[arg-type]
    dit = family.load_dit(Placement(CPU))
    make_network(options.network, family.lora_module, dit, seed=0).module.eval()
    with torch.no_grad():
        sampler.make(lambda _: dit, nullcontext, "000003", lambda: False)
    return family.decoded


ProjectOf = Callable[[str], tuple[TinyFamily, Path]]


def projects_in(make_folder: Callable[[str], Path]) -> ProjectOf:
    """Projects by the name of their family, each written when it is first asked for."""
    made: dict[str, tuple[TinyFamily, Path]] = {}

    def project_of(name: str) -> tuple[TinyFamily, Path]:
        if name not in made:
            made[name] = family_named(name), write_project(make_folder("project"), family_named(name))
        return made[name]

    return project_of
