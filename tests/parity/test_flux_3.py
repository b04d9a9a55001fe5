"""Pictures and edits of FLUX 3 equal those of diffusers' modular pipelines, and LoRAs those that it reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_pipeline import Flux3LoraLoaderMixin
from PIL import Image
from safetensors.torch import load_file

import convert_lora
import flux_3_generate_image
from tests.faults.messages import succeed_here
from tests.flux_3.making import in_diffusers, pipeline, predict_with, tiny_inputs
from tests.flux_3.test_references import write_noise
from tests.parity.running import assert_equal, image_in, latents_in
from tests.parity.test_training_steps import cached, train
from tests.tiny.flux_3 import tiny_state, write_dit, write_tiny_flux_3

PROMPT, NEGATIVE, SEED, STEPS = "a small rabbit runs through the grass", "low quality", 20, 4
LONG = f"{PROMPT}, " * 30  # two windows of 80 tokens, and more
FLOATS = ("--vae_dtype", "float32", "--text_encoder_dtype", "float32", "--dit_dtype", "float32")
ONE, TWO = ((75, 61),), ((64, 48), (50, 83))
SIZE = (48, 80)
# references, size, prompt
CASES: dict[str, tuple[tuple[tuple[int, int], ...], tuple[int, int] | None, str]] = {
    "text": ((), SIZE, PROMPT),
    "a long text": ((), SIZE, LONG),
    "an edit": (ONE, None, PROMPT),
    "an edit of another size": (ONE, SIZE, PROMPT),
    "two references": (TWO, None, PROMPT),
}
DAILY = {"base-an edit", "distilled-text"}


@pytest.mark.parametrize(
    ("is_distilled", "case"),
    [
        pytest.param(
            is_distilled,
            case,
            id=f"{release}-{case}",
            marks=[pytest.mark.slow] * (f"{release}-{case}" not in DAILY),
        )
        for is_distilled, release in ((False, "base"), (True, "distilled"))
        for case in CASES
    ],
)
def test_pictures_equal_those_of_the_modular_pipeline(tmp_path: Path, is_distilled: bool, case: str) -> None:
    sizes, size, prompt = CASES[case]
    files = write_tiny_flux_3(tmp_path / "models", is_flow_map=is_distilled)
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    images = [write_noise(path, *each) for path, each in zip(paths, sizes, strict=True)]
    words: list[object] = [*files.models, "--prompt", prompt, "--seed", SEED, "--infer_steps", STEPS, *FLOATS]
    words += ["--output_type", "latent_images", "--save_path", tmp_path / "out", "--device", "cpu"]
    asked: dict[str, Any] = {"prompt": prompt, "num_inference_steps": STEPS, "output_type": "np"}
    if size is not None:
        words += ["--image_size", *size]
        asked |= {"height": size[0], "width": size[1]}
    if images:
        words += ["--control_image_path", *paths]
        asked["image"] = images
    if not is_distilled:
        words += ["--negative_prompt", NEGATIVE]
        asked["negative_prompt"] = NEGATIVE

    flux_3_generate_image.main([str(word) for word in words])

    state = pipeline(files, is_distilled)(**asked, generator=torch.Generator().manual_seed(SEED))
    assert_equal(latents_in(tmp_path / "out")[:, 0], state.get("latents")[0], case)
    levels = 255 * state.get("images")[0]
    image = image_in(tmp_path / "out").numpy()
    assert image.shape == levels.shape
    assert np.abs(image - levels).max() < 0.6


@pytest.mark.slow
def test_decoding_latents_of_an_edit_crops_too(tmp_path: Path) -> None:
    files = write_tiny_flux_3(tmp_path / "models")
    write_noise(tmp_path / "a.png", *ONE[0])
    words = [*files.models, *FLOATS, "--device", "cpu"]
    made = ["--prompt", PROMPT, "--infer_steps", "1", "--control_image_path", str(tmp_path / "a.png")]
    folder = tmp_path / "out"
    flux_3_generate_image.main([*words, *made, "--output_type", "latent_images", "--save_path", str(folder)])
    (latents,) = folder.glob("*_latent.safetensors")

    decoded = ["--latent_path", str(latents), "--save_path", str(tmp_path / "again")]
    flux_3_generate_image.main([*words, *decoded])

    assert torch.equal(image_in(folder), image_in(tmp_path / "again"))
    (path,) = folder.glob("*.png")
    assert Image.open(path).size == ONE[0]


# what a file of the target begins with
TARGETS = {"other": "diffusion_model.", "diffusers": "transformer."}


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    cached(tmp_path, "flux_3")
    return train(tmp_path, "flux_3")


@torch.no_grad()
@pytest.mark.slow
def test_every_dialect_of_a_trained_lora_has_its_effect_in_diffusers(dit: Path, tmp_path: Path) -> None:
    """And merged with our tool; files as saved load nothing there, which is why they are converted."""
    lora, inputs = tmp_path / "out" / "lora.safetensors", tiny_inputs()
    without, merged = predict_with(in_diffusers(load_file(dit)), inputs), tmp_path / "merged.safetensors"
    tool = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", merged]
    succeed_here("merge_lora.py", *tool, folder=tmp_path)
    expected = predict_with(in_diffusers(load_file(merged)), inputs)
    assert (expected - without).abs().max() > 1e-2
    release = write_dit(tmp_path / "release", load_file(dit), "diffusers_sharded")

    for target, start in TARGETS.items():
        made, back = tmp_path / f"{target}.safetensors", tmp_path / f"from {target}.safetensors"
        convert_lora.main(["--input", str(lora), "--output", str(made), "--target", target])
        tensors = load_file(made)
        assert len(tensors) == 2 * 6 * (3 * 2 + 3)
        assert all(name.startswith(start) and ".alpha" not in name for name in tensors)
        network = in_diffusers(load_file(dit))
        network.load_lora_adapter(Flux3LoraLoaderMixin.lora_state_dict(str(made)), prefix="transformer")
        assert_equal(predict_with(network, inputs), expected, target)

        convert_lora.main(["--input", str(made), "--output", str(back), "--target", "default"])
        assert load_file(back).keys() == load_file(lora).keys()
        tool = ["--dit", release, "--lora_weight", made, "--save_merged_model", merged]
        succeed_here("merge_lora.py", *tool, folder=tmp_path)
        assert_equal(predict_with(in_diffusers_folder(merged), inputs), expected, "merged")


def in_diffusers_folder(path: Path) -> Any:
    """diffusers' network of a file that has its names already."""
    network = in_diffusers(tiny_state())
    network.load_state_dict(load_file(path))
    return network
