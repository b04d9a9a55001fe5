"""Trainings in 16 bits on the emulated device: of every family in fp16 on bf16 caches, and of joined weights.

accelerate refuses fp16 without a GPU, so that no other test reaches its gradient scaler.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.emulated.test_families import _can_be_emulated  # noqa: F401
from tests.emulated_cuda.pairs import run_on_device
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, OUTPUT, TinyFamily, family_called

pytestmark = pytest.mark.slow
HALF = torch.float16
JOINED = "networks.shared_inputs:multiply_parts"  # gradients of joined weights


def store_as(folder: Path, model_dtype: torch.dtype, text_dtype: torch.dtype) -> None:
    """Rewrite the files of a tiny model in other dtypes, except its autoencoders'."""
    for path in folder.rglob("*.safetensors"):
        if "vae" in path.name or path.name.startswith("ae"):
            continue
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        dtype = model_dtype if "dit" in path.name else text_dtype
        tensors = {
            name: tensor.to(dtype) if tensor.dtype in (torch.float32, HALF) else tensor
            for name, tensor in load_file(path).items()
        }
        path.unlink()  # it is mapped
        save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_bf16_caches_train_in_fp16(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)
    # FramePack has no --dit_dtype: its file is in fp16
    is_framepack = family.name.startswith("framepack")
    store_as(tmp_path / "model", HALF if is_framepack else torch.bfloat16, torch.bfloat16)
    for command in (family.cache_latents, family.cache_texts):
        succeed_here(*(word.replace("float32", "bfloat16") for word in command), folder=tmp_path)
    words = ["--mixed_precision", "fp16", *([] if is_framepack else ["--dit_dtype", "float16"])]

    run_on_device([*family.train, *OUTPUT, "--max_train_steps", "2", *words], folder=tmp_path)

    factors = load_file(tmp_path / "output" / "lora.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in factors.values())
    up = [tensor for name, tensor in factors.items() if "lora_up" in name or "lora_B" in name]
    assert any(bool(tensor.any()) for tensor in up)


@pytest.mark.parametrize("name", ["z_image", "qwen_image"])
def test_joined_weights_train_the_lora_of_separate_ones(name: str, tmp_path: Path) -> None:
    """A device joins the frozen weights of layers with a common input, a CPU does not.

    By plain gradient descent: Adam would make a step of each rounding.
    """
    family = family_called(name)
    family.prepare(tmp_path)
    store_as(tmp_path / "model", torch.bfloat16, torch.bfloat16)
    for command in (family.cache_latents, family.cache_texts):
        succeed_here(*command, folder=tmp_path)
    train = [*family.train, *OUTPUT, "--max_train_steps", "3", "--mixed_precision", "bf16"]
    train += ["--optimizer_type", "SGD", "--max_grad_norm", "0"]
    succeed_here(*train, "--output_dir", "here", folder=tmp_path)

    (done,) = run_on_device([*train, "--output_dir", "there"], folder=tmp_path, counted=[JOINED])

    assert done.calls[JOINED] > 0
    here, there = (load_file(tmp_path / folder / "lora.safetensors") for folder in ("here", "there"))
    assert here.keys() == there.keys()
    up = [key for key in here if "lora_up" in key]
    largest = max(float(here[key].abs().max()) for key in up)
    assert largest > 0
    for key in up:  # sums of products are rounded to 8 bits once, not after each product
        assert float((here[key] - there[key]).float().abs().max()) <= largest * 2**-5, key
