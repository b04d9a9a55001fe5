"""HunyuanImage-2.1 as the shared loops see it: sampling, prompts, sizes, options, and what is refused; its
transformer against recorded vectors and diffusers; and its files.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.options import PLAIN_GUIDANCE
from checkpoints.opening import open_checkpoint
from generation.denoise import SeededNoise, denoise
from hunyuan_image.configs import LATENT, NOISE
from hunyuan_image.family import HunyuanImage
from hunyuan_image.files import HunyuanImageFiles, read_dit_header
from hunyuan_image.options import HunyuanImageTrainingOptions, ProjectedGuidanceOptions, translate_training
from hunyuan_image_train_network import DEFAULTS as TRAINING
from modules.errors import CacheError, CheckpointError, DatasetError, OptionError
from modules.flow.schedule import make_schedule
from modules.flow.solvers import solver_for
from modules.options import read_options
from modules.parser import add_options
from protocols.data import Batch, MediaTable
from protocols.families import FAMILIES
from protocols.requests import Prepared, Request
from protocols.steps import EncodedPrompts
from tests.golden_cases import FOLDER, read_case
from tests.hunyuan_image.making import golden_model, in_diffusers, run_there
from tests.tiny.dits import dit_called
from tests.tiny.hunyuan_dit import tiny_state as video_state
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_image import (
    CONFIG,
    GLYPH_DIM,
    TEXT_DIM,
    tiny_state,
    write_dit,
    write_tiny_hunyuan_image,
)
from training.image_options import image_training_parser

CPU = torch.device("cpu")
DESCRIPTION, TENSORS = read_case("hunyuan_image_sampling")
FAMILY = HunyuanImage(HunyuanImageFiles())


def prepare(prompt: str = "a cat", family: HunyuanImage = FAMILY, **asked: Any) -> Prepared:
    return family.prepare(Request(prompt, 7, **asked))


def text(ending: str, glyphs: bool = False) -> dict[str, Tensor | list[Tensor]]:
    """Conditions of a recorded text."""
    states = TENSORS[f"text{ending}"][0]
    found: dict[str, Tensor | list[Tensor]] = {
        "vlm_embed": [states],
        "vlm_mask": [torch.ones(len(states), dtype=torch.int64)],
        "byt5_embed": TENSORS["byt5"][0],
        "byt5_mask": TENSORS["byt5_mask"][0],
    }
    return found if glyphs else found | {"byt5_mask": torch.zeros_like(TENSORS["byt5_mask"][0])}


@pytest.mark.parametrize("run", DESCRIPTION["runs"], ids=lambda run: run["name"])
def test_whole_sampling_equals_the_recorded_latents(run: dict[str, Any]) -> None:
    start = run["apg_start_step"]
    projection = ProjectedGuidanceOptions(
        apg_start_step_ocr=start if run["ocr"] else 0,
        apg_start_step_general=start,
        guidance_rescale_apg=run["guidance_rescale_apg"],
    )
    family = replace(FAMILY, projection=projection)
    prompt = 'a sign "yes"' if run["ocr"] else "a cat"
    prepared = prepare(prompt, family, guidance_scale=run["guidance_scale"], steps=DESCRIPTION["steps"])
    noise = SeededNoise(DESCRIPTION["seed"], CPU, True).draw((1, 16, 1, 4, 6), torch.bfloat16)
    assert torch.equal(noise[:, :, 0], TENSORS["noise"])
    section = EncodedPrompts(text("", run["ocr"]), text("_negative")).section(noise.float())
    solver = solver_for(prepared.solver, prepared.steps, DESCRIPTION["flow_shift"])
    guidance = make_guidance(prepared, replace(PLAIN_GUIDANCE, guidance_rescale=run["guidance_rescale"]))

    latents = denoise(family, lambda _: golden_model(), section, section.noise, solver, guidance)

    torch.testing.assert_close(latents[:, :, 0], TENSORS[run["name"]], **DESCRIPTION["tolerance"]["latent*"])


def test_the_noise_levels_are_those_recorded() -> None:
    cases = json.loads((FOLDER / "image_schedules.json").read_text(encoding="utf-8"))["cases"]
    found = [one for one in cases if one["family"] == "hunyuan_image"]
    assert found
    for case in found:
        schedule = make_schedule(prepare().solver, case["steps"], case["shift"])
        torch.testing.assert_close(schedule.sigmas, torch.tensor(case["sigmas"]), atol=2e-6, rtol=0)
        times = schedule.timesteps.float().trunc()
        assert times.tolist() == case["timesteps_given_to_model"]


def test_what_the_release_does_is_the_default() -> None:
    plain, characters = prepare(), prepare("a sign with “hello”")

    assert (plain.width, plain.height, plain.frames, plain.steps) == (2048, 2048, 1, 50)
    assert (plain.guidance_scale, plain.flow_shift) == ((3.5,), 5)
    assert plain.rules.projection is not None
    assert characters.rules.projection is not None
    rule = plain.rules.projection
    assert (rule.after_step, characters.rules.projection.after_step) == (5, 38)
    assert (rule.scale, rule.momentum, rule.norm_limit, rule.eta, rule.rescale) == (10, -0.5, 10, 0, 0)
    assert prepare("it's the dog's").rules == plain.rules
    assert plain.negative_prompt == ""
    assert FAMILY.defaults.noise_on_cpu


def test_any_size_is_cut_to_whole_latents() -> None:
    prepared = FAMILY.prepare(Request("a cat", 0, width=100, height=47, flow_shift=3.0))

    assert (prepared.width, prepared.height, prepared.flow_shift) == (96, 32, 3.0)


def test_training_feeds_whole_timesteps_up_to_1000() -> None:
    assert NOISE.integer_timesteps
    assert NOISE.training_offset == 0
    assert NOISE.table_is_shifted
    assert NOISE.count_tokens is not None
    assert NOISE.count_tokens((1, 64, 1, 32, 48)) == 16 * 24  # although a patch is one latent pixel
    assert LATENT.to_model(torch.ones(1)).item() == pytest.approx(0.75289)


def test_caches_of_other_encoders_are_refused(tmp_path: Path) -> None:
    family = HunyuanImage(HunyuanImageFiles(dit=write_dit(tmp_path, tiny_state())))
    tensors: dict[str, Tensor | list[Tensor]] = {
        "vlm_embed": [torch.zeros(3, TEXT_DIM + 1)],
        "vlm_mask": [torch.ones(3)],
        "byt5_embed": torch.zeros(1, 8, GLYPH_DIM),
        "byt5_mask": torch.zeros(1, 8),
    }

    with pytest.raises(CacheError, match="vlm_embed in its cache has width 65"):
        family.batch_conditions(torch.zeros(1, 64, 1, 2, 2), Batch(tensors, ("a",), ("a.png",)))
    del tensors["byt5_mask"]
    with pytest.raises(CacheError, match="byt5_mask"):
        family.batch_conditions(torch.zeros(1, 64, 1, 2, 2), Batch(tensors, ("a",), ("a.png",)))


def test_clips_and_control_images_are_refused() -> None:
    with pytest.raises(DatasetError, match="can only learn images"):
        FAMILY.check_table(MediaTable("data.toml", "video"))
    with pytest.raises(DatasetError, match="control images, which .* cannot take"):
        FAMILY.check_table(MediaTable("data.toml", "image", has_control=True))


def test_files_that_do_not_belong_together_are_refused_before_anything_loads(tmp_path: Path) -> None:
    tiny = write_tiny_hunyuan_image(tmp_path)
    files = HunyuanImageFiles(dit=tiny.dit, vae=tiny.vae, text_encoder=tiny.text_encoder, byt5=tiny.byt5)
    HunyuanImage(files).check_files(media=True)

    other = replace(files, dit=write_dit(tmp_path, tiny_state(text_dim=32), name="other"))
    with pytest.raises(CheckpointError, match="produces hidden states of width 64, .* takes width 32"):
        HunyuanImage(other).check_files(media=True)
    with pytest.raises(OptionError, match="--byt5"):
        HunyuanImage(replace(files, byt5=None)).check_files(media=True)
    with pytest.raises(CheckpointError, match="--vae"):
        HunyuanImage(replace(files, vae=tiny.byt5)).check_files(media=True)


def training_args(*words: str) -> argparse.Namespace:
    parser = image_training_parser(None, TRAINING)
    add_options(parser, HunyuanImageTrainingOptions)
    return parser.parse_args(["--pretrained_model_name_or_path", "dit", *words])


def test_training_has_the_released_defaults_and_other_names_of_attention() -> None:
    args = training_args("--network_train_unet_only", "--attn_mode", "flash", "--vae", "vae", "--byt5", "b")

    translate_training(args)

    assert (args.timestep_sampling, args.discrete_flow_shift) == ("sigma", 5)
    assert (args.model_prediction_type, args.flash_attn) == ("raw", True)
    options = read_options(HunyuanImageTrainingOptions, args)
    assert (options.dit, options.vae.file.vae) == (Path("dit"), Path("vae"))
    latents, _ = FAMILIES["hunyuan_image"].caching_commands(options, Path("data.toml"), ())
    assert latents.endswith("--dataset_config data.toml --vae vae")


def test_text_encoders_do_not_learn(caplog: pytest.LogCaptureFixture) -> None:
    args = training_args()
    with caplog.at_level("INFO"):
        translate_training(args)

    assert args.network_train_unet_only
    assert "--network_train_unet_only is assumed" in caplog.text
    with pytest.raises(OptionError, match="do not learn"):
        translate_training(training_args("--network_train_text_encoder_only"))


def test_tiles_are_those_of_the_release_and_not_too_small() -> None:
    plain, tiled = (
        read_options(HunyuanImageTrainingOptions, training_args("--network_train_unet_only", *words)).vae
        for words in ((), ("--vae_tiling",))
    )
    assert (plain.tile, tiled.tile) == (None, 384)
    with pytest.raises(OptionError, match="--vae_spatial_tile_sample_min_size 64"):
        read_options(HunyuanImageTrainingOptions, training_args("--vae_spatial_tile_sample_min_size", "64"))


NEAR = 3e-6  # of the largest value: the same formulas in float32, summed in another order


def test_forward_equals_the_recorded_output() -> None:
    case, tensors = read_case("hunyuan_image_dit")
    inputs = (tensors[name] for name in ("text", "text_mask", "byt5", "byt5_mask"))

    velocity = golden_model()(tensors["x"], tensors["t"].float(), *inputs)

    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, tensors["out"], **case["tolerance"]["out"])


@pytest.mark.parametrize("batch", [1, 3])
def test_forward_equals_diffusers_with_the_same_weights(batch: int) -> None:
    """The first picture has nothing to write."""
    tiny = dit_called("hunyuan_image")
    inputs = tiny.inputs((1, 4, 6, 9), batch)

    velocity = tiny.make((CONFIG.double_blocks, CONFIG.single_blocks))(**inputs)

    expected = run_there(in_diffusers(), inputs)
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({**tiny_state(), "time_r_in.mlp.0.weight": torch.zeros(2)}, "distilled"),
        ({**tiny_state(), "guidance_in.mlp.0.weight": torch.zeros(2)}, "distilled"),
        (video_state(), "HunyuanVideo"),
        ({**tiny_state(), "img_in.proj.weight": torch.zeros(64, 64, 2, 2)}, "patches of 2 x 2"),
        (tiny_state(in_dim=16), "16 latent channels"),
        ({key: value for key, value in tiny_state().items() if "time_in" not in key}, "incomplete"),
    ],
    ids=["meanflow", "guidance", "video", "patches", "channels", "incomplete"],
)
def test_other_files_are_refused_by_name(state: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    path = save(tmp_path / "dit.safetensors", state)

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=says):
        read_dit_header(checkpoint)
