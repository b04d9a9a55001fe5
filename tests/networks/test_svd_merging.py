"""networks/svd_merge_lora.py, against NumPy's decomposition of the sum."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks import svd_merge_lora
from tests.faults.messages import assert_one_message, run_here

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SIZE = 320


def write(path: Path, rank: int, alpha: float, seed: int) -> np.ndarray:
    """Write a LoRA of Stable Diffusion 1; return its change, alpha / rank * up @ down."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, SIZE), generator=generator)
    up = torch.randn((SIZE, rank), generator=generator)
    tensors = {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up}
    save_file({**tensors, f"{NAME}.alpha": torch.tensor(alpha)}, path)
    return (up.double() @ down.double() * alpha / rank).numpy()


@pytest.mark.parametrize("rank", [2, 7])
def test_the_merged_lora_is_the_nearest_of_its_rank_to_the_sum(rank: int, tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", 4, 2.0, seed=1)
    second = write(tmp_path / "b.safetensors", 3, 3.0, seed=2)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "c")]
    words = ["--models", *files[:2], "--ratios", "0.5", "-1", "--new_rank", str(rank), "--family", "sd1"]

    svd_merge_lora.main([*words, "--save_to", files[2]])

    made = load_file(files[2])
    assert made[f"{NAME}.alpha"] == rank
    change = made[f"{NAME}.lora_up.weight"].double() @ made[f"{NAME}.lora_down.weight"].double()
    u, sizes, vh = np.linalg.svd(0.5 * first - second)
    nearest = (u[:, :rank] * sizes[:rank]) @ vh[:rank]
    # factors in float32
    np.testing.assert_allclose(change.numpy(), nearest, atol=2e-5 * sizes[0])
    with safe_open(files[2], "pt") as file:
        assert file.metadata()["ss_network_dim"] == str(rank)


def test_strengths_of_blocks_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", 2, 2.0, seed=1)
    words = ["--models", "a.safetensors", "--ratios", "1", "--save_to", "b.safetensors", "--lbws", "[1]"]
    code, said = run_here("networks/svd_merge_lora.py", *words, folder=tmp_path)
    assert_one_message(code, said, "one strength for each file")
