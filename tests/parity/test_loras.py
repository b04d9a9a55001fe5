"""A LoRA trained by the command line acts in diffusers as here; a sample with the settings of trainers."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from torch import Tensor

from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from networks.adapter import make_network
from tests.commands import run_script
from tests.golden_cases import read_case
from tests.parity import reference
from tests.parity.projects import Project, train, write_project
from tests.parity.reference import (
    Inputs,
    Sampling,
    denoise,
    draw_noise,
    open_image,
    relative_error,
    to_pixels,
)
from tests.parity.running import assert_equal, generate_one, models_in
from tests.parity.theirs import Theirs
from tests.tiny.project import write_image
from tests.training.watched import Watched
from training.options import TrainingOptions, read_arguments, training_parser
from training.samples import prepare_samples
from wan.family import family_for_training
from wan.options import WanTrainingOptions

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


CPU = torch.device("cpu")


def sample_latents(project: Project, line: str, folder: Path) -> Tensor:
    """What a training that continues the project's LoRA would show at its next sample: 16 F h w."""
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    words = ["--task", project.task, *models_in(project.models), "--network_dim", "4", "--sdpa"]
    words += [
        *("--dataset_config", str(project.folder / "dataset.toml"), "--output_dir", str(folder)),
        *("--output_name", "lora"),
    ]
    args = read_arguments(
        parser, [*words, "--network_weights", str(project.folder / "out" / "lora.safetensors")]
    )
    options, family = (
        read_options(TrainingOptions, args),
        Watched(family_for_training(read_options(WanTrainingOptions, args))),
    )
    (folder / "prompts.txt").write_text(f"{line}\n", encoding="utf-8")
    sampler = prepare_samples(family, folder / "prompts.txt", folder / "sample", "lora", CPU, 0, 1)  # type: ignore[arg-type]
    dit = family.load_dit(Placement(CPU))
    make_network(options.network, family.lora_module, dit, seed=0).module.eval()
    with torch.no_grad():
        sampler.make(lambda _: dit, nullcontext, "000003", lambda: False)
    ((latents,),) = family.decoded
    return latents


def with_lora(project: Project) -> Theirs:
    """diffusers' networks, the transformer with the LoRA file."""
    theirs = Theirs(project.models)
    state = WanLoraLoaderMixin.lora_state_dict(str(project.folder / "out" / "lora.safetensors"))
    theirs.dit.load_lora_adapter(state, prefix="transformer")
    return theirs


def test_what_a_line_leaves_out_is_that_of_the_known_trainers(tmp_path: Path) -> None:
    """One frame, 20 steps, flow shift 14.5, guidance 5 with the release's negative text; sizes rounded down
    to multiples of 16.
    """
    project = write_project(tmp_path / "project", "t2v")
    train(project, *LEARN_FAST, steps=3, in_process=True)
    theirs = with_lora(project)
    negative = read_case("text_constants")[0]["wan_default_negative_prompt"]
    inputs = Inputs(draw_noise(3, 1, 32, 48), theirs.text("a squirrel"), theirs.text(negative))

    sample = sample_latents(project, "a squirrel --w 50 --h 47 --d 3", tmp_path)

    assert_equal(
        sample,
        denoise(theirs.dit, inputs, Sampling(flow_shift=14.5, scales=(5.0,) * 20)),
        "sample with defaults",
    )
