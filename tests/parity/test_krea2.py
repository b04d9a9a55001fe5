"""LoRAs of Krea 2 in every dialect, and models that they are merged into, are those that diffusers reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import convert_lora
from tests.faults.messages import succeed_here
from tests.krea2.making import in_diffusers, predict_with, tiny_inputs
from tests.parity import pipelines
from tests.parity.running import assert_equal
from tests.parity.test_training_steps import cached, train
from tests.tiny.dit_files import TinyModel
from tests.tiny.krea2 import write_dit

# what a file of the target begins with
TARGETS = {"other": "diffusion_model.", "diffusers": "transformer."}


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    cached(tmp_path, "krea2")
    return train(tmp_path, "krea2")


@torch.no_grad()
@pytest.mark.slow
def test_every_dialect_of_a_trained_lora_has_its_effect_in_diffusers(dit: Path, tmp_path: Path) -> None:
    """Of all layers; and merged with our tool into files of both layouts."""
    models = tmp_path / "model"
    files = TinyModel(dit, models / "vae.safetensors", models / "text_encoder")
    lora, given = tmp_path / "out" / "lora.safetensors", tiny_inputs()
    without, merged = predict_with(in_diffusers(load_file(files.dit)), given), tmp_path / "merged.safetensors"
    folder = write_dit(tmp_path / "release", load_file(files.dit), "diffusers_sharded")
    tool = ["--dit", files.dit, "--lora_weight", lora, "--save_merged_model", merged]
    succeed_here("merge_lora.py", *tool, folder=tmp_path)
    expected = predict_with(in_diffusers(load_file(merged)), given)
    assert (expected - without).abs().max() > 1e-2

    for target, start in TARGETS.items():
        made, back = tmp_path / f"{target}.safetensors", tmp_path / f"from {target}.safetensors"
        convert_lora.main(["--input", str(lora), "--output", str(made), "--target", target])
        tensors = load_file(made)
        assert len(tensors) == 2 * (8 * 2 + 33 + 7)
        assert all(name.startswith(start) and ".alpha" not in name for name in tensors)
        pipe = pipelines.krea2(files)
        pipe.load_lora_weights(made)
        assert_equal(predict_with(pipe.transformer, given), expected, target, 1e-4)

        convert_lora.main(["--input", str(made), "--output", str(back), "--target", "default"])
        assert load_file(back).keys() == load_file(lora).keys()
        tool = ["--dit", folder, "--lora_weight", made, "--save_merged_model", merged]
        succeed_here("merge_lora.py", *tool, folder=tmp_path)
        assert "img_in.weight" in load_file(merged)  # as in the folder
        assert_equal(predict_with(in_diffusers(load_file(merged)), given), expected, "merged", 1e-4)
