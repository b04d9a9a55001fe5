"""Whole checkpoints as folders in diffusers' layout: its pipelines, our scripts and a second training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.shard_options import INDEX as SHARD_INDEX
from checkpoints.shard_options import MODEL
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.stable_diffusion.test_whole_training import SCRIPTS, SGD, TOWERS, U_NET, draw, folder, words
from tests.tiny.dit_files import write_tensors
from tests.tiny.stable_diffusion import WRITERS, ldm_unet, ldm_vae, open_clip, vae_state, write_folder
from training.saving.files import INDEX

__all__ = ["folder"]  # a fixture
PIPELINES: dict[str, Any] = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}
TRAINED_TEXTS = {"sdxl": ["--train_text_encoder"], "sd1": [], "sd2": ["--train_text_encoder"]}
AS_FOLDER = ("--save_model_as", "diffusers", "--output_name", "model")
CACHED = ("--cache_latents", "--cache_latents_to_disk")


def released_state(kind: str, pipeline: Any) -> dict[str, Tensor]:
    """The tensors of a pipeline's networks, by the names of a single file."""
    state = {f"{U_NET}{name}": value for name, value in ldm_unet(pipeline.unet.state_dict()).items()}
    state |= {
        f"first_stage_model.{name}": value for name, value in ldm_vae(pipeline.vae.state_dict()).items()
    }
    towers = [pipeline.text_encoder, *([pipeline.text_encoder_2] if kind == "sdxl" else [])]
    for tower, (start, is_open_clip) in zip(towers, TOWERS[kind], strict=True):
        outside = ("text_model.", "text_projection.")
        found = {
            name if name.startswith(outside) else f"text_model.{name}": value
            for name, value in tower.state_dict().items()
        }
        state |= {f"{start}{name}": v for name, v in (open_clip(found) if is_open_clip else found).items()}
    return state


@pytest.mark.parametrize(
    "kind",
    [
        "sdxl",
        pytest.param("sd1", marks=pytest.mark.slow),
        pytest.param("sd2", marks=pytest.mark.slow),
    ],
)
def test_a_folder_holds_what_the_single_file_of_the_same_run_holds(folder: Path, kind: str) -> None:
    """All networks, as diffusers' pipeline loads them."""
    model = WRITERS[kind](folder)
    given = [*SGD, *CACHED, *TRAINED_TEXTS[kind]]

    succeed_here(SCRIPTS[kind], *words(model.name, *given), folder=folder)
    said = succeed_here(SCRIPTS[kind], *words(model.name, *given, *AS_FOLDER), folder=folder)

    single = load_file(folder / "output" / "last.safetensors")
    pipeline = PIPELINES[kind].from_pretrained(folder / "output" / "model", local_files_only=True)
    found = released_state(kind, pipeline)
    added = ("logit_scale", "position_ids") + (("text_projection",) if kind == "sd2" else ())
    compared = {name for name in found if not name.endswith(added)}
    assert len(compared) > 300
    for name in compared:
        assert torch.equal(found[name], single[name]), name
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    tokens = [pipeline.tokenizer, *([pipeline.tokenizer_2] if kind == "sdxl" else [])]
    assert [one.pad_token for one in tokens] == {
        "sd1": ["<|endoftext|>"],
        "sd2": ["!"],
        "sdxl": ["<|endoftext|>", "!"],
    }[kind]
    assert "extract_lora" not in said
    assert not [path for path in (folder / "output").iterdir() if path.name.endswith(".tmp")]


def test_networks_of_a_folder_are_cut_on_request(folder: Path) -> None:
    """As diffusers' pipeline loads them; small networks stay one file. A single file is not cut."""
    model = WRITERS["sd1"](folder)
    cut = [*SGD, *CACHED, *AS_FOLDER, "--max_shard_size", "1MB"]
    succeed_here("train_db.py", *words(model.name, *SGD, *CACHED, *AS_FOLDER[:2]), folder=folder)

    succeed_here("train_db.py", *words(model.name, *cut), folder=folder)

    made = folder / "output" / "model"
    index = json.loads((made / "unet" / f"{MODEL}{SHARD_INDEX}").read_text("utf-8"))
    assert {*index["weight_map"].values()} == {path.name for path in (made / "unet").glob("*.safetensors")}
    assert len({*index["weight_map"].values()}) > 1
    loaded = StableDiffusionPipeline.from_pretrained(made, local_files_only=True)
    expected = StableDiffusionPipeline.from_pretrained(folder / "output" / "last", local_files_only=True)
    for name, tensor in expected.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor), name
    assert (draw(folder, "output/model", "of_parts") == draw(folder, "output/last", "of_files")).all()
    code, said = run_here("train_db.py", *words(model.name, "--max_shard_size", "1MB"), folder=folder)
    assert_one_message(code, said, "--max_shard_size 1MB: ComfyUI", "Add --save_model_as diffusers")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SCRIPTS])
def test_a_folder_is_drawn_with_and_trained_on_as_the_single_file_is(folder: Path, kind: str) -> None:
    """Pictures and the next training's file are equal; what the folder predicts is written into it."""
    write_folder(kind, folder / "model", velocity=True)
    given = [*SGD, *CACHED, *TRAINED_TEXTS[kind], "--zero_terminal_snr"]
    succeed_here(SCRIPTS[kind], *words("model", *given), folder=folder)
    succeed_here(SCRIPTS[kind], *words("model", *given, *AS_FOLDER, "--ema_decay", "0.9"), folder=folder)

    for source, name in (("model", "of_folder"), ("last.safetensors", "of_file")):
        again = [*given, "--v_parameterization", "--output_name", name]
        succeed_here(SCRIPTS[kind], *words(f"output/{source}", *again), folder=folder)
    first, second = (load_file(folder / "output" / f"of_{name}.safetensors") for name in ("folder", "file"))
    unused = ".resblocks.3." if kind == "sd2" else "none"  # a layer that the folder lacks
    assert [
        name for name in second if unused not in name and not torch.equal(second[name], first[name])
    ] == []
    assert (folder / "output" / "model-ema" / INDEX).is_file()
    zero = ["--zero_terminal_snr"]
    images = [
        draw(folder, "output/model", "from_folder"),
        draw(folder, "output/last.safetensors", "one", *zero),
    ]
    assert (images[0] == images[1]).all()
    schedule = json.loads(
        (folder / "output" / "model" / "scheduler" / "scheduler_config.json").read_text("utf-8")
    )
    assert schedule["prediction_type"] == "v_prediction"
    assert schedule["rescale_betas_zero_snr"] is True


def test_folders_expire_and_are_set_aside_as_files_are(folder: Path) -> None:
    """Also one that the next run of this name begins with, which stays where it is until it is replaced."""
    model = WRITERS["sd1"](folder)
    kept = ["--stop_text_encoder_training", "-1", "--save_every_n_steps", "1", "--save_last_n_steps", "0"]
    other = {name: 1.5 * value for name, value in ldm_vae(vae_state()).items()}
    write_tensors(folder / "other.safetensors", other)
    run = words(model.name, *kept, *AS_FOLDER, "--vae", "other.safetensors", steps=3)
    said = succeed_here("train_db.py", *run, folder=folder)
    assert "keep the VAE of sd1.safetensors; that of --vae is only used for latents and samples" in said
    vae = load_file(folder / "output" / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(vae["decoder.conv_in.weight"], vae_state()["decoder.conv_in.weight"])
    output = folder / "output"
    names = {path.name for path in output.iterdir() if (path / INDEX).is_file()}
    assert names == {"model", "model-step00000003"}
    before = (output / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    again = words("output/model", "--stop_text_encoder_training", "-1", *AS_FOLDER, "--learning_rate", "1e-3")
    said = succeed_here("train_db.py", *again, folder=folder)

    (aside,) = output.glob("model.before-*")
    assert {path.name for path in aside.iterdir() if path.is_dir()} == names
    assert (aside / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert (output / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != before
    assert "are now in" in said


def test_other_forms_are_refused_by_name(tmp_path: Path) -> None:
    for script, form, reason in (
        ("sdxl_train.py", "ckpt", "a ckpt can hold code. Use safetensors, diffusers"),
        ("flux_train.py", "ckpt", "a ckpt can hold code. Use safetensors."),
        ("krea2_train.py", "diffusers", "without text encoders and VAE. Use safetensors."),
    ):
        code, said = run_here(script, "--save_model_as", form, folder=tmp_path)
        assert_one_message(code, said, f"--save_model_as: {form}: ", reason)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SCRIPTS])
def test_diffusers_reads_both_forms_and_draws_the_picture_of_gen_img(folder: Path, kind: str) -> None:
    model = WRITERS[kind](folder)
    given = [*SGD, *CACHED, *TRAINED_TEXTS[kind]]
    succeed_here(SCRIPTS[kind], *words(model.name, *given), folder=folder)
    succeed_here(SCRIPTS[kind], *words(model.name, *given, *AS_FOLDER), folder=folder)
    as_folder = PIPELINES[kind].from_pretrained(folder / "output" / "model", local_files_only=True)
    parts: dict[str, Any] = {}
    if kind == "sdxl":  # towers of equal width: the reader would take the first one for both
        config = as_folder.text_encoder_2.config
        state = load_file(folder / "output" / "last.safetensors")
        second = type(as_folder.text_encoder_2)(config).eval()
        converted = convert_open_clip_checkpoint(second, state, prefix="conditioner.embedders.1.model.")
        second.load_state_dict(converted, strict=False)
        parts["text_encoder_2"] = second
    as_file = PIPELINES[kind].from_single_file(
        str(folder / "output" / "last.safetensors"),
        config=str(folder / "output" / "model"),
        local_files_only=True,
        **parts,
    )

    ours = draw(folder, "output/last.safetensors", "ours").astype(float)

    for pipeline in (as_folder, as_file):
        pipeline.set_progress_bar_config(disable=True)
        if kind == "sdxl":
            pipeline.register_to_config(force_zeros_for_empty_prompt=False)  # as gen_img.py reads it
        schedule = dict(pipeline.scheduler.config)
        pipeline.scheduler = DDIMScheduler.from_config(
            {**schedule, "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
        )
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        drawn = pipeline(
            "a cat",
            latents=latents,
            num_inference_steps=2,
            guidance_scale=7.5,
            height=64,
            width=64,
            output_type="np",
        ).images[0]
        assert np.abs(255 * drawn - ours).max() < 3
        assert ours.std() > 10
