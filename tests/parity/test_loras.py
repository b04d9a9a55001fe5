"""A LoRA trained by the command line acts in diffusers as here, and one of another tool acts here as
there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.commands import run_script
from tests.golden_cases import read_case
from tests.parity import reference
from tests.parity.projects import ALPHA, RANK, Project, train, write_project
from tests.parity.reference import (
    Inputs,
    Sampling,
    denoise,
    draw_noise,
    open_image,
    relative_error,
    to_pixels,
)
from tests.parity.running import assert_equal, generate_one
from tests.parity.theirs import Theirs
from tests.parity.training import linear_modules
from tests.tiny.project import write_image

SEED, STEPS, HEIGHT, WIDTH, FRAMES = 8, 3, 32, 48, 5
ASK = (
    *("--prompt", "a cat", "--seed", SEED, "--infer_steps", STEPS, "--video_size", HEIGHT, WIDTH),
    *("--video_length", FRAMES),
)
NEGATIVE = read_case("text_constants")[0]["wan_default_negative_prompt"]
LEARN_FAST = ("--optimizer_type", "AdamW", "--learning_rate", 0.05)


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """kind -> a project in which `lora` was trained on all modules."""
    made: dict[str, Project] = {}

    def project_of(kind: str) -> Project:
        if kind not in made:
            made[kind] = write_project(tmp_path_factory.mktemp(kind) / "project", kind)
            train(made[kind], *LEARN_FAST, steps=3)
            write_image(made[kind].folder / "start.png", WIDTH, HEIGHT)
        return made[kind]

    return project_of


def lora_of(project: Project, name: str = "lora") -> Path:
    return project.folder / "out" / f"{name}.safetensors"


def here(folder: Path, project: Project, *lora: object, in_process: bool = True) -> Tensor:
    """Latents that wan_generate_video.py makes."""
    image = ["--image_path", project.folder / "start.png"] if project.kind == "i2v" else []
    return generate_one(folder, project.models, project.task, *ASK, *image, *lora, in_process=in_process)


def there(project: Project, load: Callable[[WanTransformer3DModel], None] | None = None) -> Tensor:
    """The same latents made with diffusers; load: puts a LoRA into its transformer."""
    theirs = Theirs(project.models)
    if load is not None:
        load(theirs.dit)
    clip = condition = None
    if project.kind == "i2v":
        image = open_image(project.folder / "start.png")
        clip = reference.features_of(theirs, image)
        condition = reference.image_condition(theirs, to_pixels([image]), FRAMES)
    inputs = Inputs(
        draw_noise(SEED, FRAMES, HEIGHT, WIDTH), theirs.text("a cat"), theirs.text(NEGATIVE), clip, condition
    )
    return denoise(theirs.dit, inputs, Sampling(scales=(5.0,) * STEPS))


def loaded(path: Path, strength: float = 1.0) -> Callable[[WanTransformer3DModel], None]:
    """What a user of diffusers calls."""

    def load(dit: WanTransformer3DModel) -> None:
        dit.load_lora_adapter(
            WanLoraLoaderMixin.lora_state_dict(str(path)), prefix="transformer", adapter_name="ours"
        )
        dit.set_adapters("ours", strength)

    return load


def convert(source: Path, target: str) -> Path:
    """By convert_lora.py, next to the file."""
    output = source.with_name(f"{source.stem} {target}.safetensors")
    run_script(
        "convert_lora.py",
        *("--input", source.name, "--output", output.name, "--target", target),
        folder=source.parent,
    )
    return output


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("dialect", ["ours", "converted"])
def test_a_trained_lora_acts_in_diffusers_as_here(
    tmp_path: Path, projects: Callable[[str], Project], kind: str, dialect: str
) -> None:
    project = projects(kind)
    path = lora_of(project)
    for_diffusers = path if dialect == "ours" else convert(path, "other")

    latents = here(tmp_path, project, "--lora_weight", path, in_process=dialect != "ours")

    assert_equal(latents, there(project, loaded(for_diffusers)), f"{kind} {dialect}")
    assert relative_error(latents, there(project)) > 0.01


def test_a_merged_model_is_that_which_diffusers_fuses(
    tmp_path: Path, projects: Callable[[str], Project]
) -> None:
    """merge_lora.py, from another folder; the merged file as --dit."""
    project, merged = projects("t2v"), tmp_path / "merged.safetensors"
    lora = ("--lora_weight", lora_of(project), "--lora_multiplier", 0.7)

    run_script(
        "merge_lora.py",
        *("--dit", project.dit),
        *lora,
        *("--save_merged_model", merged.name, "--device", "cpu"),
        folder=tmp_path,
    )

    latents = here(tmp_path / "merged", project, "--dit", merged)
    assert_equal(latents, there(project, loaded(lora_of(project), 0.7)), "merged")


def in_dialect(project: Project, dialect: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The trained LoRA as other tools write it, alpha / rank multiplied into the up factor."""
    stored, paths = load_file(lora_of(project)), linear_modules(project.dit)
    tensors: dict[str, Tensor] = {}
    for name, path in paths.items():
        down, up = (stored[f"lora_unet_{name}.lora_{part}.weight"] for part in ("down", "up"))
        official = f"diffusion_model.{official_path(name)}"
        starts = {
            "diffusion-pipe": official,
            "diffusers": f"transformer.{path}",
            "PEFT": f"base_model.model.{path}",
        }
        tensors[f"{starts[dialect]}.lora_A.weight"] = down
        tensors[f"{starts[dialect]}.lora_B.weight"] = up * (ALPHA / RANK)
    return tensors, {"format": "pt"}


def official_path(name: str) -> str:
    """`blocks_0_cross_attn_k_img` -> `blocks.0.cross_attn.k_img`."""
    blocks, index, rest = name.split("_", 2)
    for part in ("self_attn", "cross_attn", "ffn"):
        if rest.startswith(part):
            return f"{blocks}.{index}.{part}.{rest.removeprefix(part + '_')}"
    raise ValueError(name)


@pytest.mark.parametrize("dialect", ["diffusion-pipe", "diffusers", "PEFT"])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_files_of_other_tools_act_as_ours(
    tmp_path: Path, projects: Callable[[str], Project], kind: str, dialect: str
) -> None:
    project = projects(kind)
    save_file(
        *in_dialect(project, dialect)[:1], tmp_path / "other.safetensors", in_dialect(project, dialect)[1]
    )

    latents = here(tmp_path / "other", project, "--lora_weight", tmp_path / "other.safetensors")

    assert_equal(
        latents, here(tmp_path / "ours", project, "--lora_weight", lora_of(project)), f"{kind} {dialect}"
    )


@pytest.mark.parametrize("alpha", [RANK, 9])
def test_a_lora_that_diffusers_saves_acts_here_as_there(
    tmp_path: Path, projects: Callable[[str], Project], alpha: int
) -> None:
    """On parts that our own LoRAs leave out, too; settings stand in the file's metadata."""
    project = projects("t2v")
    settings: Mapping[str, Any] = {
        "r": RANK,
        "lora_alpha": alpha,
        "alpha_pattern": {"blocks.0.attn1.to_q": 2},
    }

    def add(dit: WanTransformer3DModel) -> None:
        dit.add_adapter(
            LoraConfig(**settings, target_modules=["to_q", "to_out.0", "net.0.proj", "time_proj", "proj_out"])
        )
        generator = torch.Generator().manual_seed(0)
        for name, parameter in dit.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        dit.save_lora_adapter(tmp_path, weight_name="theirs.safetensors")

    expected = there(project, add)
    latents = here(tmp_path / "here", project, "--lora_weight", tmp_path / "theirs.safetensors")

    assert_equal(latents, expected, f"saved by diffusers, alpha {alpha}")
    assert relative_error(latents, there(project)) > 0.01
