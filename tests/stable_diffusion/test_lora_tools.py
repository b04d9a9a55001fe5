"""Tools for LoRAs of Stable Diffusion: merged into a single file, extracted from two, added up, converted."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_lora
import merge_lora
from modules.errors import CheckpointError
from networks import extract_lora_from_models, sdxl_merge_lora
from networks.deltas import group_by_module, weight_delta
from networks.loading import read_lora
from stable_diffusion.contract import Model
from tests.stable_diffusion.loaded import load
from tests.stable_diffusion.making_loras import in_places, put_in, results, write_kohya
from tests.tiny.stable_diffusion import (
    WRITERS,
    tokenizer_folder,
    unet_state,
    write_sd1,
    write_sdxl,
)

CPU = torch.device("cpu")


@pytest.fixture
def tokenizers(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "tokenizers")


def assert_same(one: Model, other: Model, tolerance: float = 1e-5) -> None:
    for found, wanted in zip(results(one), results(other), strict=True):
        scale = wanted.std()
        torch.testing.assert_close(found / scale, wanted / scale, rtol=tolerance, atol=tolerance)


def merge(tool: str, source: Path, path: Path, output: Path, multiplier: float) -> None:
    if tool == "merge_lora":
        words = ["--dit", source, "--lora_weight", path, "--lora_multiplier", multiplier, "--device", "cpu"]
        merge_lora.main([*map(str, words), "--save_merged_model", str(output)])
    else:
        words = ["--sd_model", source, "--models", path, "--ratios", multiplier, "--save_to", output]
        sdxl_merge_lora.main([str(word) for word in words])


def is_extracted(path: str) -> bool:
    return in_places(path) and path != "conv_in"


@pytest.mark.parametrize(
    ("kind", "tool"),
    [
        ("sd1", "merge_lora"),
        pytest.param("sd2", "merge_lora", marks=pytest.mark.slow),
        ("sdxl", "sdxl_merge_lora"),
    ],
)
def test_merged_into_a_checkpoint_and_extracted_again_it_acts_as_when_added(
    tmp_path: Path, tokenizers: Path, kind: str, tool: str
) -> None:
    source, output = WRITERS[kind](tmp_path), tmp_path / "merged.safetensors"
    model = load(source, "--tokenizer_cache_dir", tokenizers)
    path = write_kohya(tmp_path / "x.safetensors", model, is_extracted)
    put_in(model, path, "--network_mul", 0.5)

    merge(tool, source, path, output, 0.5)

    merged = load(output, "--tokenizer_cache_dir", tokenizers)
    assert_same(merged, model)
    before, after = load_file(source), load_file(output)
    assert before.keys() == after.keys()
    kept = [name for name in before if name.startswith("first_stage_model.")]
    assert all(torch.equal(before[name], after[name]) for name in kept)

    extracted = tmp_path / "extracted.safetensors"
    words = ["--model_org", source, "--model_tuned", output, "--save_to", extracted, "--clamp_quantile", 1]
    extract_lora_from_models.main([*map(str, words), "--dim", "3", "--conv_dim", "3", "--device", "cpu"])

    again = load(source, "--tokenizer_cache_dir", tokenizers)
    put_in(again, extracted)
    assert_same(again, merged, 1e-3)
    with safe_open(extracted, "pt") as file:
        version = file.metadata()["ss_base_model_version"]
        names = set(file.keys())
    assert version == {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[kind]
    assert ("lora_unet_middle_block_1_proj_in.alpha" in names) == (kind == "sdxl")


def test_unchanged_text_encoders_are_left_out_and_other_models_refused(tmp_path: Path) -> None:
    source, tuned, lora = write_sdxl(tmp_path), tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors"
    tensors = load_file(source)
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    tensors[name][:64] += 0.5
    save_file(tensors, tuned)
    words = ["--model_org", str(source), "--model_tuned", str(tuned), "--save_to", str(lora)]
    words += ["--clamp_quantile", "1", "--device", "cpu"]

    extract_lora_from_models.main(words)

    assert {each.split("_")[1] for each in load_file(lora)} == {"unet", "te2"}
    changes = {
        module: weight_delta(factors, CPU) for module, factors in group_by_module(load_file(lora)).items()
    }
    layer = "lora_te2_text_model_encoder_layers_0_self_attn"
    largest = {key: float(one.abs().max()) for key, one in changes.items() if one is not None}
    assert largest[f"{layer}_q_proj"] > 0.1
    assert largest[f"{layer}_k_proj"] < 1e-3
    words[3] = str(write_sd1(tmp_path))
    with pytest.raises(CheckpointError, match="are not the same model"):
        extract_lora_from_models.main(words)


def test_loras_are_added_up_to_one_with_the_names_that_others_read(tmp_path: Path, tokenizers: Path) -> None:
    model = load(write_sdxl(tmp_path), "--tokenizer_cache_dir", tokenizers)
    one = write_kohya(tmp_path / "one.safetensors", model, in_places)
    other = write_kohya(tmp_path / "two.safetensors", model, lambda path: path.endswith("attn2.to_k"))
    total = tmp_path / "sum.safetensors"

    words = ["--models", one, other, "--ratios", 0.5, -2, "--save_to", total, "--concat"]
    sdxl_merge_lora.main([str(word) for word in words])

    both = load(model.path, "--tokenizer_cache_dir", tokenizers)
    put_in(both, one, other, "--network_mul", 0.5, -2)
    put_in(model, total)
    assert_same(model, both)
    assert read_lora(total).metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert set(load_file(one)) <= set(load_file(total))


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_converted_to_diffusers_and_back_it_has_the_same_names(
    tmp_path: Path, tokenizers: Path, kind: str
) -> None:
    model = load(WRITERS[kind](tmp_path), "--tokenizer_cache_dir", tokenizers)
    path = write_kohya(tmp_path / "x.safetensors", model, lambda path: ".attn" in path)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"

    convert_lora.main(["--input", str(path), "--output", str(there), "--target", "diffusers"])
    convert_lora.main(["--input", str(there), "--output", str(back), "--target", "default"])

    made = load_file(there)
    assert any(name.startswith("unet.") for name in made)
    assert {name for name in made if name.startswith("text_encoder_2.")} or kind == "sd1"
    assert set(load_file(back)) == set(load_file(path))
    other = load(model.path, "--tokenizer_cache_dir", tokenizers)
    put_in(model, path)
    put_in(other, back)
    assert_same(model, other, 1e-4)


def test_old_names_of_text_encoders_and_positions_left_out_make_no_difference(tmp_path: Path) -> None:
    source, old = write_sd1(tmp_path), tmp_path / "old.safetensors"
    text = "cond_stage_model.transformer."
    tensors = {name.replace(f"{text}text_model.", text): one for name, one in load_file(source).items()}
    tensors.pop(f"{text}embeddings.position_ids")
    save_file(tensors, old)
    module = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    factors = {"lora_down.weight": torch.ones(1, 64), "lora_up.weight": torch.ones(128, 1)}
    save_file({f"{module}.{part}": one for part, one in factors.items()}, lora)

    merge("sdxl_merge_lora", old, lora, merged, 0.5)

    changed = f"{text}encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(load_file(merged)[changed], tensors[changed] + 0.5)
    extracted = tmp_path / "extracted.safetensors"
    words = ["--model_org", old, "--model_tuned", merged, "--save_to", extracted, "--device", "cpu"]
    extract_lora_from_models.main([*map(str, words), "--clamp_quantile", "1"])
    again = group_by_module(load_file(extracted))[module]
    delta = weight_delta(again, CPU)
    assert delta is not None
    torch.testing.assert_close(delta, torch.full((128, 64), 0.5), atol=1e-4, rtol=1e-4)
    # a fine-tuned file that has what the original leaves out
    tensors[f"{text}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, merged)
    extract_lora_from_models.main([str(word) for word in words])


def test_a_lora_for_text_encoders_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    module = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    lora, output = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    factors = {"lora_down.weight": torch.ones(1, 64), "lora_up.weight": torch.ones(128, 1)}
    save_file({f"{module}.{part}": one for part, one in factors.items()}, lora)
    alone = tmp_path / "unet.safetensors"
    save_file(unet_state("sd1"), alone)

    for source in (write_sdxl(tmp_path), alone):
        with pytest.raises(CheckpointError, match="changes text encoders alone, which .* does not hold"):
            merge("merge_lora", source, lora, output, 1.0)
    assert not output.exists()
