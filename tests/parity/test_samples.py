"""A sample made while training is what the generation script makes of the saved LoRA, and what diffusers
makes of it.

Samples are stored as pictures and videos. Pictures lose nothing but rounding, so those of the command line
are compared; of videos the latents are compared, caught where the sampler hands them to the decoder.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers.loaders import WanLoraLoaderMixin
from torch import Tensor

from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from networks.adapter import make_network
from tests.golden_cases import read_case
from tests.parity import reference
from tests.parity.datasets import decoded
from tests.parity.projects import Project, train, write_project
from tests.parity.reference import Inputs, Sampling, denoise, draw_noise, open_image, to_pixels
from tests.parity.running import assert_equal, generate_one, models_in
from tests.parity.theirs import Theirs
from tests.tiny.project import write_clips, write_image
from tests.training.watched import Watched
from training.options import TrainingOptions, read_arguments, training_parser
from training.samples import prepare_samples
from wan.family import family_for_training
from wan.options import WanTrainingOptions

CPU = torch.device("cpu")
HEIGHT, WIDTH, FRAMES, STEPS, SEED, SCALE, SHIFT = 32, 48, 9, 4, 77, 3.5, 2.0
PROMPT, NEGATIVE = "two dogs play", "subtitles, low quality"
LINE = f"{PROMPT} --w {WIDTH} --h {HEIGHT} --d {SEED} --s {STEPS} --fs {SHIFT} --l {SCALE} --n {NEGATIVE}"
ASK = [
    "--prompt",
    PROMPT,
    "--video_size",
    HEIGHT,
    WIDTH,
    "--seed",
    SEED,
    "--infer_steps",
    STEPS,
    "--flow_shift",
    SHIFT,
]
ASK += ["--guidance_scale", SCALE, "--negative_prompt", NEGATIVE]
LEARN_FAST = ("--optimizer_type", "AdamW", "--learning_rate", 0.05)
# media of each kind of model: in a sample line, and as options of a generation
MEDIA: dict[str, tuple[str, list[str]]] = {
    "t2v": ("", []),
    "i2v": ("--i start.png", ["--image_path", "start.png"]),
    "flf2v": ("--i start.png --ei end.png", ["--image_path", "start.png", "--end_image_path", "end.png"]),
    "fun-control": ("--cn control/clip 0.mp4", ["--control_path", "control/clip 0.mp4"]),
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """kind -> a project in which `lora` was trained for three steps."""
    made: dict[str, Project] = {}

    def project_of(kind: str) -> Project:
        if kind not in made:
            made[kind] = project = write_project(tmp_path_factory.mktemp(kind) / "project", kind)
            write_image(project.folder / "start.png", WIDTH, HEIGHT)
            write_image(project.folder / "end.png", WIDTH, HEIGHT)
            write_clips(project.folder / "control", count=1, frames=FRAMES)
            train(project, *LEARN_FAST, steps=3, in_process=True)
        return made[kind]

    return project_of


def sample_latents(project: Project, line: str, folder: Path) -> Tensor:
    """What a training that continues the project's LoRA would show at its next sample: 16 F h w."""
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    words = ["--task", project.task, *models_in(project.models), "--network_dim", "4", "--sdpa"]
    words += [
        "--dataset_config",
        str(project.folder / "dataset.toml"),
        "--output_dir",
        str(folder),
        "--output_name",
        "lora",
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


def with_diffusers(project: Project, frames: int = FRAMES) -> Tensor:
    """The latents of the sample line as diffusers makes them."""
    theirs = with_lora(project)
    clip = extra = None
    images = [
        open_image(path)
        for path in (project.folder / "start.png", project.folder / "end.png")
        if path.exists()
    ]
    pixels = [to_pixels([image]) for image in images]
    if project.kind == "i2v":
        clip, extra = (
            reference.features_of(theirs, images[0]),
            reference.image_condition(theirs, pixels[0], frames),
        )
    elif project.kind == "flf2v":
        clip, extra = (
            reference.features_of(theirs, *images),
            reference.first_last_condition(theirs, *pixels, frames),
        )
    elif project.kind == "fun-control":
        control = [
            reference.covering(frame, HEIGHT, WIDTH)
            for frame in decoded(project.folder / "control" / "clip 0.mp4")
        ]
        extra = reference.control_condition(theirs, to_pixels(control), None)
        clip = torch.zeros(1, 257, theirs.dit.config.image_dim)
    inputs = Inputs(
        draw_noise(SEED, frames, HEIGHT, WIDTH), theirs.text(PROMPT), theirs.text(NEGATIVE), clip, extra
    )
    return denoise(theirs.dit, inputs, Sampling(flow_shift=SHIFT, scales=(SCALE,) * STEPS))


@pytest.mark.parametrize("kind", MEDIA)
def test_latents_of_a_sample_equal_those_of_the_generation_script(
    tmp_path: Path, projects: Callable[[str], Project], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, (line, media) = projects(kind), MEDIA[kind]
    monkeypatch.chdir(project.folder)

    sample = sample_latents(project, f"{LINE} --f {FRAMES} {line}", tmp_path)

    lora = ["--lora_weight", project.folder / "out" / "lora.safetensors", "--video_length", FRAMES]
    generated = generate_one(tmp_path, project.models, project.task, *ASK, *lora, *media, in_process=True)
    assert_equal(sample, generated, f"sample {kind} and generation")
    assert_equal(sample, with_diffusers(project), f"sample {kind} and diffusers")


def test_what_a_line_leaves_out_is_that_of_the_known_trainers(
    tmp_path: Path, projects: Callable[[str], Project]
) -> None:
    """One frame, 20 steps, flow shift 14.5, guidance 5 with the release's negative text; sizes rounded down
    to multiples of 16.
    """
    project = projects("t2v")
    theirs = with_lora(project)
    negative = read_case("text_constants")[0]["wan_default_negative_prompt"]
    inputs = Inputs(draw_noise(3, 1, 32, 48), theirs.text("a squirrel"), theirs.text(negative))

    sample = sample_latents(project, "a squirrel --w 50 --h 47 --d 3", tmp_path)

    assert_equal(
        sample,
        denoise(theirs.dit, inputs, Sampling(flow_shift=14.5, scales=(5.0,) * 20)),
        "sample with defaults",
    )
