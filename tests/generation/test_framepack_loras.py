"""LoRAs on fpack_generate_video.py: FramePack's own and HunyuanVideo's, chosen by patterns, merged into a
file or for one run.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fpack_generate_video
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from tests.networks.making_hunyuan import saved
from tests.tiny.framepack import TinyFramePack, write_tiny_framepack

SAY = (
    "--prompt",
    "a cat",
    "--video_size",
    32,
    48,
    "--video_sections",
    1,
    "--infer_steps",
    1,
    "--seed",
    1,
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFramePack:
    return write_tiny_framepack(tmp_path_factory.mktemp("framepack"))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """One of HunyuanVideo, of the width that the tiny FramePack has too."""
    saved(tmp_path / "hv.safetensors", alpha=3)
    return tmp_path / "hv.safetensors"


def test_patterns_and_multipliers_are_for_each_lora_and_for_the_names_of_the_file_or_the_model(
    tmp_path: Path, files: TinyFramePack, lora: Path
) -> None:
    loras = ("--lora_weight", lora, lora, "--lora_multiplier", 0.5, -1)
    patterns = (
        "--include_patterns",
        "img_attn_qkv",
        "single_transformer_blocks",
        "--exclude_patterns",
        "attn_to_k",
        "proj_mlp",
    )

    words = (
        *files.models,
        *SAY,
        "--save_path",
        tmp_path,
        *loras,
        *patterns,
        "--save_merged_model",
        tmp_path / "m",
    )
    fpack_generate_video.main([str(word) for word in words])

    before, after = load_file(files.dit), load_file(tmp_path / "m")
    patch = LoraPatch([LoraUse(read_lora(lora), 0.5, "double"), LoraUse(read_lora(lora), -1.0, "single")])
    expected = {
        f"{block}.{module}.weight"
        for blocks, modules in (
            ([f"transformer_blocks.{index}" for index in range(2)], ("attn.to_q", "attn.to_v")),
            (
                [f"single_transformer_blocks.{index}" for index in range(3)],
                ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out"),
            ),
        )
        for block in blocks
        for module in modules
    }
    assert {name for name, weight in after.items() if not torch.equal(weight, before[name])} == expected
    assert all(torch.equal(after[name], patch(name, before[name])) for name in expected)
