"""LoRAs extracted from a fine-tuned Qwen-Image, by qwen_extract_lora.py."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.hunyuan_encoders import save
from tests.tiny.qwen_image import tiny_state
from tests.tiny.wan_encoders import vae_tensors

SCRIPT = "qwen_extract_lora.py"
FILES = ("--model_org", "model.safetensors", "--model_tuned", "tuned.safetensors")
OUTPUT = ("--save_to", "lora.safetensors")
FULL = ("--clamp_quantile", "1")


def matrices(state: dict[str, Tensor]) -> list[str]:
    """The weights that get a LoRA: all matrices of the blocks, modulation too."""
    found = [name for name in state if name.startswith("transformer_blocks.") and state[name].ndim == 2]
    assert len(found) == 28
    return found


def write(folder: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a model, and one that differs in each matrix by a product of this rank; return both."""
    state, generator = tiny_state(), torch.Generator().manual_seed(3)
    tuned = dict(state)
    for name in matrices(state):
        rows, columns = state[name].shape
        up = torch.randn(rows, rank, generator=generator) / columns**0.5
        tuned[name] = state[name] + 0.1 * up @ torch.randn(rank, columns, generator=generator)
    save_file(state, folder / "model.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return state, tuned


def products(path: Path) -> dict[str, Tensor]:
    """What a LoRA file adds, by the names of its modules."""
    tensors = load_file(path)
    names = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    assert len(tensors) == 3 * len(names)
    return {
        name: tensors[f"{name}.alpha"]
        / len(tensors[f"{name}.lora_down.weight"])
        * tensors[f"{name}.lora_up.weight"]
        @ tensors[f"{name}.lora_down.weight"]
        for name in names
    }


def module(name: str) -> str:
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")


def test_a_difference_of_low_rank_comes_back_and_makes_the_tuned_model(tmp_path: Path) -> None:
    state, tuned = write(tmp_path, rank=2)

    succeed_here(SCRIPT, *FILES, *OUTPUT, *FULL, "--dim", 3, folder=tmp_path)

    found = products(tmp_path / "lora.safetensors")
    assert found.keys() == {module(name) for name in matrices(state)}
    merging = ["--dit", "model.safetensors", "--lora_weight", "lora.safetensors"]
    succeed_here("merge_lora.py", *merging, "--save_merged_model", "merged.safetensors", folder=tmp_path)
    merged = load_file(tmp_path / "merged.safetensors")
    for name, weight in tuned.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=2e-6)  # of weights near 1, in float32
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {"ss_network_module": "networks.lora_qwen_image", "ss_base_model_version": "qwen_image"}
    assert metadata.items() >= {**expected, "ss_network_dim": "3"}.items()
    assert metadata["modelspec.architecture"] == "Qwen-Image/lora"


def test_weights_that_are_equal_get_no_lora(tmp_path: Path) -> None:
    """As those that a merged LoRA did not have."""
    state, tuned = write(tmp_path, rank=2)
    same = matrices(state)[3]
    save_file({**tuned, same: state[same]}, tmp_path / "tuned.safetensors")

    said = succeed_here(SCRIPT, *FILES, *OUTPUT, "--dim", 3, folder=tmp_path)

    assert "equal in both models, so without a LoRA: 1 module" in said
    assert products(tmp_path / "lora.safetensors").keys() == {
        module(name) for name in matrices(state) if name != same
    }


@pytest.mark.parametrize("quantile", [0.99, 1.0])
def test_factors_are_those_of_torchs_decomposition(tmp_path: Path, quantile: float) -> None:
    state, tuned = write(tmp_path, rank=40)
    rank = 5

    succeed_here(SCRIPT, *FILES, *OUTPUT, "--clamp_quantile", quantile, "--dim", rank, folder=tmp_path)

    found = products(tmp_path / "lora.safetensors")
    for name in matrices(state):
        u, s, vh = torch.linalg.svd(tuned[name] - state[name], full_matrices=False)
        up, down = u[:, :rank] * s[:rank], vh[:rank]
        if quantile < 1:
            # so that the largest number of each row of down is positive
            signs = torch.stack([row[row.abs().argmax()].sign() for row in down])
            up, down = up * signs, down * signs[:, None]
            limit = float(torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile))
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
        torch.testing.assert_close(found[module(name)], up @ down, rtol=1e-4, atol=1e-5)


def test_numbers_have_the_type_that_is_asked_for_and_metadata_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, rank=2)

    succeed_here(SCRIPT, *FILES, *OUTPUT, "--save_precision", "bf16", "--no_metadata", folder=tmp_path)

    factors = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for name, tensor in factors.items() if ".lora_" in name} == {torch.bfloat16}
    assert {tensor.shape[0] for name, tensor in factors.items() if "lora_down" in name} == {4}
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert not any(name.startswith("modelspec") for name in file.metadata())


@pytest.mark.parametrize("case", ["vae", "size", "missing", "same"])
def test_files_that_do_not_fit_are_one_message(tmp_path: Path, case: str) -> None:
    state, tuned = write(tmp_path, rank=2)
    place = tmp_path / "tuned.safetensors"
    words: tuple[str, ...] = ()
    if case == "vae":
        save(place, vae_tensors())
        words = ("has no blocks of Qwen-Image", "It is a Wan2.1 VAE")
    elif case == "size":
        save_file(tiny_state(num_layers=3), place)
        words = ("are not the same model", "transformer_blocks.2.", "missing")
    elif case == "missing":
        place.unlink()
        words = ("--model_tuned", "tuned.safetensors")
    else:
        words = ("--save_to tuned.safetensors is one of the files to read",)

    output = ("--save_to", "tuned.safetensors") if case == "same" else OUTPUT
    code, said = run_here(SCRIPT, *FILES, *output, folder=tmp_path)

    assert_one_message(code, said, *words)
    assert not (tmp_path / "lora.safetensors").exists()
