"""Z-Image through the command lines equals diffusers: whole pipelines, steps of training, and LoRAs."""

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import convert_lora
import zimage_generate_image
from encoders.autoencoder import SCALE, SHIFT
from networks import convert_z_image_lora_to_comfy
from tests.encoders.test_autoencoder import diffusers_autoencoder
from tests.faults.messages import succeed_here
from tests.parity.running import assert_equal, latents_in, picture_in
from tests.parity.test_training_steps import CASES as CASES_OF_TRAINING
from tests.parity.test_training_steps import cached, train
from tests.parity.training import descent
from tests.tiny.language_models import QWEN3_TEMPLATE, qwen3
from tests.tiny.z_image import TinyZImage, comfy_state, write_dit, write_tiny_z_image
from tests.z_image.making import in_diffusers, predict_with, tiny_inputs

PROMPT, NEGATIVE, SEED = "a red cat sits down", "dull", 20
HEIGHT, WIDTH, STEPS, FLOW_SHIFT = 48, 80, 4, 3.0
TUNER = numpy.linspace(1, 0.001, STEPS + 1)[:-1].tolist()
# what is asked here -> there; guidance scales count from 0 in both
CASES: dict[str, tuple[list[str], dict[str, object]]] = {
    "turbo": (["--even_steps"], {"guidance_scale": 0.0}),
    "base": (["--even_steps", "--guidance_scale", "3"], {"guidance_scale": 3.0}),
    "levels of the known tuner": (["--guidance_scale", "3"], {"guidance_scale": 3.0, "sigmas": TUNER}),
    "normalised and truncated": (
        ["--even_steps", "--guidance_scale", "3", "--renorm_cfg", "1.1", "--cfg_trunc_ratio", "0.3"],
        {"guidance_scale": 3.0, "cfg_normalization": 1.1, "cfg_truncation": 0.3},
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyZImage:
    return write_tiny_z_image(tmp_path_factory.mktemp("models"))


def theirs(files: TinyZImage) -> ZImagePipeline:
    """diffusers' pipeline with the weights of these files, in float32 on the CPU."""
    vae = diffusers_autoencoder()
    vae.register_to_config(scaling_factor=SCALE, shift_factor=SHIFT)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
        chat_template=QWEN3_TEMPLATE,
    )
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,
        text_encoder=qwen3(),
        tokenizer=tokenizer,
        transformer=in_diffusers(load_file(files.dit)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("how", CASES)
@torch.no_grad()
def test_pictures_equal_those_of_diffusers(files: TinyZImage, tmp_path: Path, how: str) -> None:
    more, settings = CASES[how]
    words = [*files.models, "--prompt", PROMPT, "--vae_dtype", "float32", "--seed", str(SEED), *more]
    words += ["--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS)]
    if settings["guidance_scale"]:
        words += ["--negative_prompt", NEGATIVE]
    words += ["--output_type", "latent_images", "--device", "cpu", "--save_path", str(tmp_path)]

    zimage_generate_image.main(words)

    pipe = theirs(files)

    def make(**output: str) -> Tensor:
        found = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            **settings,
            **output,
        ).images
        return torch.as_tensor(found)

    # another order of sums alone; float32
    assert_equal(latents_in(tmp_path)[None].squeeze(2), make(output_type="latent"), "latents", 1e-4)
    # as near as bytes can be
    assert (picture_in(tmp_path) - make(output_type="np")[0] * 255).abs().max() < 0.51


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    cached(tmp_path, "z_image")
    train(tmp_path, "z_image")
    return tmp_path / "out" / "lora.safetensors"


@torch.no_grad()
def test_every_dialect_of_a_trained_lora_has_its_effect_in_diffusers(files: TinyZImage, lora: Path) -> None:
    """And merged with our tool into models of both layouts."""
    folder, given = lora.parent, tiny_inputs()
    without = predict_with(theirs(files).transformer, given)
    other, back = folder / "diffusers.safetensors", folder / "back.safetensors"
    convert_lora.main(["--input", str(lora), "--output", str(other), "--target", "diffusers"])
    comfy = folder / "comfy.safetensors"
    convert_z_image_lora_to_comfy.main([str(lora), str(comfy)])
    convert_z_image_lora_to_comfy.main(["--reverse", str(comfy), str(back)])
    for path in (lora, other, back):
        pipe = theirs(files)
        pipe.load_lora_weights(path)
        loaded = predict_with(pipe.transformer, given)
        assert (loaded - without).abs().max() > 1e-2
        if path is lora:
            expected = loaded
        assert_equal(loaded, expected, path.name, 1e-4)

    merged = folder / "merged.safetensors"
    joined = write_dit(folder, comfy_state(load_file(files.dit)), name="joined")
    for path in (lora, comfy):
        found = []
        for dit in (files.dit, joined):
            tool = ["--dit", dit, "--lora_weight", path, "--save_merged_model", merged]
            succeed_here("merge_lora.py", *tool, folder=folder)
            found.append(load_file(merged))
        assert_equal(predict_with(in_diffusers(found[0]), given), expected, "merged", 1e-4)
        for name, tensor in comfy_state(found[0]).items():
            torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_the_whole_transformer_is_saved_for_diffusers(files: TinyZImage, tmp_path: Path) -> None:
    cached(tmp_path, "z_image")
    words = ["--dataset_config", "dataset.toml", "--dit", files.dit, "--sdpa", *descent(1.0, steps=1)]
    words += CASES_OF_TRAINING["z_image"].options
    succeed_here("zimage_train.py", *words, folder=tmp_path)

    before, after = load_file(files.dit), load_file(tmp_path / "out" / "lora.safetensors")
    in_diffusers(after)  # all names and shapes
    assert not {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
