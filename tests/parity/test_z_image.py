"""LoRAs of Z-Image, and whole transformers, are those that diffusers reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import convert_lora
from networks import convert_z_image_lora_to_comfy
from tests.faults.messages import succeed_here
from tests.parity import pipelines
from tests.parity.running import assert_equal
from tests.parity.test_training_steps import CASES, cached, train
from tests.parity.training import descent
from tests.tiny.dit_files import TinyModel
from tests.tiny.z_image import comfy_state, write_dit, write_tiny_z_image
from tests.z_image.making import in_diffusers, predict_with, tiny_inputs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_z_image(tmp_path_factory.mktemp("models"))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    cached(tmp_path, "z_image")
    train(tmp_path, "z_image")
    return tmp_path / "out" / "lora.safetensors"


@pytest.mark.slow
@torch.no_grad()
def test_every_dialect_of_a_trained_lora_has_its_effect_in_diffusers(files: TinyModel, lora: Path) -> None:
    """And merged with our tool into models of both layouts."""
    folder, given = lora.parent, tiny_inputs()
    without = predict_with(pipelines.z_image(files).transformer, given)
    other, back = folder / "diffusers.safetensors", folder / "back.safetensors"
    convert_lora.main(["--input", str(lora), "--output", str(other), "--target", "diffusers"])
    comfy = folder / "comfy.safetensors"
    convert_z_image_lora_to_comfy.main([str(lora), str(comfy)])
    convert_z_image_lora_to_comfy.main(["--reverse", str(comfy), str(back)])
    for path in (lora, other, back):
        pipe = pipelines.z_image(files)
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


def test_the_whole_transformer_is_saved_for_diffusers(files: TinyModel, tmp_path: Path) -> None:
    cached(tmp_path, "z_image")
    words = ["--dataset_config", "dataset.toml", "--dit", files.dit, "--sdpa", *descent(1.0, steps=1)]
    words += CASES["z_image"].options
    succeed_here("zimage_train.py", *words, folder=tmp_path)

    before, after = load_file(files.dit), load_file(tmp_path / "out" / "lora.safetensors")
    in_diffusers(after)  # all names and shapes
    assert not {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
