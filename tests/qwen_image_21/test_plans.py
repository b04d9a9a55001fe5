"""Memory plans of Qwen-Image-2.1: references, the vision tower, and what tiles of the VAE save."""

from pathlib import Path

import pytest
import torch

import qwen_image_21_generate_image
from generation.memory import make_phase, memory_plan, rehearsing
from protocols.data import MediaEncoders
from qwen_image_21.vae import load_vae
from tests.manifests import tensor_list, write_hollow
from tests.tiny.project import write_image
from tests.tiny.qwen_image_21 import write_tiny_qwen_image_21

GIB = 1 << 30


@pytest.mark.slow
def test_a_plan_counts_references_and_the_vision_tower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_tiny_qwen_image_21(tmp_path)
    write_image(tmp_path / "a.png", 160, 160)
    plan = [
        *files.models,
        *["--prompt", "hat", "--image_size", "64", "64", "--plan", "8", "--save_path", "out"],
    ]

    qwen_image_21_generate_image.main(plan)
    plain = capsys.readouterr().out
    qwen_image_21_generate_image.main([*plan, "--control_image_path", str(tmp_path / "a.png")])
    edited = capsys.readouterr().out

    assert "text encoder vl" in plain
    assert "images and videos" not in plain
    assert "images and videos" in edited


@pytest.mark.slow_cases("256-0.2", "None-7.0")
@pytest.mark.parametrize(("tile", "maximum"), [(None, 7.0), (1024, 1.8), (256, 0.2)])
def test_a_tile_bounds_the_memory_of_the_released_vae(
    tmp_path: Path, tile: int | None, maximum: float
) -> None:
    """Of 2048 x 2048 pixels in 16 bits, beside the weights."""
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list("qwen-image-2.1-vae-diffusers"))
    vae = load_vae(path, torch.device("meta"), torch.bfloat16, tile)
    for is_decoding in (True, False):
        with rehearsing(MediaEncoders(vae)) as ledger:
            if is_decoding:
                vae.decode(torch.empty(1, 64, 1, 128, 128))
            else:
                vae.encode(torch.empty(1, 4, 1, 2048, 2048, dtype=torch.uint8))
        work = next(
            part
            for part in make_phase("", ledger, memory_plan.MemoryPart("", 0)).parts
            if part.name == "work"
        )
        assert work.device < maximum * GIB
        if tile is None and is_decoding:
            assert work.device > 6 * GIB
