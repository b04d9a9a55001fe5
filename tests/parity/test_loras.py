"""LoRAs and samples through the command lines equal diffusers, of video models and Stable Diffusion."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import convert_lora
from modules.options import read_options
from modules.parser import add_options
from networks.adapter import make_network
from protocols.loading import Placement
from tests.faults.messages import succeed_here
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
from tests.parity.running import assert_equal, generate, models_in
from tests.parity.stable_diffusion import (
    FilesOf,
    assert_close,
    generators,
    pipeline,
    their_pixels,
    write_files,
)
from tests.parity.stable_diffusion import run_script as run_gen_img
from tests.parity.theirs import Theirs
from tests.stable_diffusion.loaded import load, write_kohya
from tests.tiny.project import write_image
from tests.training.watched import Watched
from training.options import TrainingOptions, read_arguments, training_parser
from training.samples import PromptSource, prepare_samples
from wan.family import family_for_training
from wan.options import WanTrainingOptions

SEED, STEPS, HEIGHT, WIDTH, FRAMES = 8, 3, 32, 48, 5
ASK = (
    *("--prompt", "a cat", "--seed", SEED, "--infer_steps", STEPS, "--video_size", HEIGHT, WIDTH),
    *("--video_length", FRAMES),
)
NEGATIVE = read_case("text_constants")[0]["wan_default_negative_prompt"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """In which `lora` was trained on all modules."""
    made = write_project(tmp_path_factory.mktemp("loras") / "project", "i2v")
    train(made, "--optimizer_type", "AdamW", "--learning_rate", 0.05, steps=3)
    write_image(made.folder / "start.png", WIDTH, HEIGHT)
    return made


def lora_of(project: Project) -> Path:
    return project.folder / "out" / "lora.safetensors"


def here(folder: Path, project: Project, *lora: object) -> Tensor:
    """Latents that wan_generate_video.py makes."""
    image = ["--image_path", project.folder / "start.png"]
    return generate(folder, project.models, project.task, *ASK, *image, *lora)


def there(project: Project, load: Callable[[WanTransformer3DModel], None] = lambda dit: None) -> Tensor:
    """The same latents made with diffusers; load: puts a LoRA into its transformer."""
    theirs = Theirs(project.models)
    load(theirs.dit)
    image = open_image(project.folder / "start.png")
    clip = reference.features_of(theirs, image)
    condition = reference.image_condition(theirs, to_pixels([image]), FRAMES)
    noise = draw_noise(SEED, FRAMES, HEIGHT, WIDTH)
    inputs = Inputs(noise, theirs.text("a cat"), theirs.text(NEGATIVE), clip, condition)
    return denoise(theirs.dit, inputs, Sampling(scales=(5.0,) * STEPS))


def loaded(path: Path, strength: float = 1.0) -> Callable[[WanTransformer3DModel], None]:
    """What a user of diffusers calls."""

    def load(dit: WanTransformer3DModel) -> None:
        dit.load_lora_adapter(
            WanLoraLoaderMixin.lora_state_dict(str(path)), prefix="transformer", adapter_name="ours"
        )
        dit.set_adapters("ours", strength)

    return load


@pytest.mark.slow
def test_a_trained_lora_acts_in_diffusers_as_here(tmp_path: Path, project: Project) -> None:
    latents = here(tmp_path, project, "--lora_weight", lora_of(project))

    assert_equal(latents, there(project, loaded(lora_of(project))), "LoRA")
    assert relative_error(latents, there(project)) > 0.01


def test_a_merged_model_is_that_which_diffusers_fuses(tmp_path: Path, project: Project) -> None:
    """merge_lora.py, from another folder; the merged file as --dit."""
    lora = ("--lora_weight", lora_of(project), "--lora_multiplier", 0.7)
    words = ("--dit", project.dit, *lora, "--save_merged_model", "merged.safetensors", "--device", "cpu")
    succeed_here("merge_lora.py", *words, folder=tmp_path)

    latents = here(tmp_path / "merged", project, "--dit", tmp_path / "merged.safetensors")

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
    source = PromptSource(folder / "prompts.txt")
    sampler = prepare_samples(family, source, folder / "sample", "lora", CPU)  # type: ignore[arg-type]
    dit = family.load_dit(Placement(CPU))
    make_network(options.network, family.lora_module, dit, seed=0).module.eval()
    with torch.no_grad():
        sampler.make(lambda _: dit, nullcontext, "000003", lambda: None)
    ((latents,),) = family.decoded
    return latents


def with_lora(project: Project) -> Theirs:
    """diffusers' networks, the transformer with the LoRA file."""
    theirs = Theirs(project.models)
    state = WanLoraLoaderMixin.lora_state_dict(str(project.folder / "out" / "lora.safetensors"))
    theirs.dit.load_lora_adapter(state, prefix="transformer")
    return theirs


@pytest.mark.slow
def test_what_a_line_leaves_out_is_that_of_the_release(tmp_path: Path) -> None:
    """50 steps, flow shift 5, guidance 5 with the release's negative text; sizes rounded down to multiples
    of 16, frames to 4n + 1.
    """
    project = write_project(tmp_path / "project", "t2v")
    train(project, "--optimizer_type", "AdamW", "--learning_rate", 0.05, steps=3)
    theirs = with_lora(project)
    negative = read_case("text_constants")[0]["wan_default_negative_prompt"]
    inputs = Inputs(draw_noise(3, 5, 32, 48), theirs.text("a squirrel"), theirs.text(negative))

    sample = sample_latents(project, "a squirrel --w 50 --h 47 --f 7 --d 3", tmp_path)

    assert_equal(
        sample,
        denoise(theirs.dit, inputs, Sampling(flow_shift=5.0, scales=(5.0,) * 50)),
        "sample with defaults",
    )


PROMPT = "a red cat sits on a table"
SD_STEPS, SCALE, SD_SEED, SIZE = 3, 5.0, 7, 32


def words(*others: object) -> list[object]:
    line = f"{PROMPT} --l {SCALE} --s {SD_STEPS} --d {SD_SEED} --w {SIZE} --h {SIZE}"
    return ["--prompt", line, "--sampler", "ddim", "--W", SIZE, "--H", SIZE, *others]


def theirs(pipe: Any) -> np.ndarray[Any, Any]:
    made = pipe(
        prompt=[PROMPT],
        num_inference_steps=SD_STEPS,
        guidance_scale=SCALE,
        generator=generators(SD_SEED),
        width=SIZE,
        height=SIZE,
    )
    return their_pixels(made)


def in_attention(path: str) -> bool:
    """diffusers converts no others for SDXL."""
    return ".attentions." in path and not path.endswith(("norm",))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_a_file_of_sd_scripts_in_the_u_net_and_the_text_encoders(
    files_of: FilesOf, tmp_path: Path, kind: str
) -> None:
    files = files_of(kind)
    model = load(files.single, "--tokenizer_cache_dir", files.tokenizers)
    path = write_kohya(tmp_path / "x.safetensors", model, in_attention)
    pipe = pipeline(files, "", "ddim")
    plain = theirs(pipe)
    pipe.load_lora_weights(path)
    wanted = theirs(pipe)
    pipe.unload_lora_weights()
    converted = tmp_path / "converted.safetensors"
    # the sizes of the tiny ones do not tell of which model it is
    words_of_conversion = ["--input", path, "--output", converted, "--target", "diffusers", "--family", kind]
    convert_lora.main([str(word) for word in words_of_conversion])
    pipe.load_lora_weights(converted)
    assert_close(theirs(pipe), wanted)
    pipe.unload_lora_weights()

    for number, how in enumerate(([], ["--network_merge"], ["--network_pre_calc"])):
        options = ["--network_module", "networks.lora", "--network_weights", path, *how]
        assert_close(run_gen_img(files, tmp_path / f"out{number}", *words(*options)), wanted)
    assert np.abs(wanted.astype(int) - plain.astype(int)).max() > 20


@pytest.mark.slow
def test_strengths_of_a_line(files_of: FilesOf, tmp_path: Path) -> None:
    files = files_of("sd1")
    model = load(files.single, "--tokenizer_cache_dir", files.tokenizers)
    path = write_kohya(tmp_path / "x.safetensors", model, in_attention)
    pipe = pipeline(files, "", "ddim")
    pipe.load_lora_weights(path, adapter_name="x")
    pipe.set_adapters(["x"], [0.4])
    wanted = theirs(pipe)
    pipe.unload_lora_weights()
    asked = words("--network_weights", path)
    asked[1] = f"{asked[1]} --am 0.4"

    assert_close(run_gen_img(files, tmp_path / "out", *asked), wanted)


def test_a_file_that_peft_and_diffusers_write(tmp_path: Path) -> None:
    """With the alphas in its metadata, of the U-Net and of the text encoder."""
    files = write_files("sd1", tmp_path)
    pipe = pipeline(files, "", "ddim")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=9, target_modules=layers, init_lora_weights="gaussian"))
    # not by its own add_adapter: transformers may ask for a PEFT that is not published yet
    get_peft_model(pipe.text_encoder, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"]))
    fill(pipe.unet)
    fill(pipe.text_encoder)
    wanted = theirs(pipe)
    save(pipe, tmp_path / "lora")
    pipe.unload_lora_weights()
    plain = theirs(pipe)
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert any(name.startswith("text_encoder.") for name in load_file(path))

    assert_close(run_gen_img(files, tmp_path / "out", *words("--network_weights", path)), wanted)
    assert np.abs(wanted.astype(int) - plain.astype(int)).max() > 20


def fill(network: Any) -> None:
    """Give the second factors values, which begin as zeros."""
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            values = np.random.default_rng(len(name)).standard_normal(parameter.shape) * 0.1
            parameter.data.copy_(parameter.data.new_tensor(values))


def save(pipe: Any, folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    states = {
        name: convert_state_dict_to_diffusers(get_peft_model_state_dict(one))
        for name, one in networks.items()
    }
    settings = {name: one.peft_config["default"].to_dict() for name, one in networks.items()}
    type(pipe).save_lora_weights(
        folder,
        states["unet"],
        states["text_encoder"],
        unet_lora_adapter_metadata=settings["unet"],
        text_encoder_lora_adapter_metadata=settings["text_encoder"],
    )
