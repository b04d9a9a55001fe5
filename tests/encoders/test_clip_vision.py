"""CLIP's image tower and its preparation of images against transformers."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from encoders.clip_layers import load_clip_vision
from modules.errors import CheckpointError
from tests.tiny.hunyuan_encoders import save

CPU = torch.device("cpu")


def write_tower(
    folder: Path, projection: int = 32, activation: str = "gelu"
) -> tuple[Path, CLIPVisionModelWithProjection]:
    """A tiny tower as a folder, and transformers' model of it."""
    torch.manual_seed(6)
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
            hidden_act=activation,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, model


def noise(width: int, height: int) -> Image.Image:
    pixels = numpy.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_vectors_are_those_of_transformers(tmp_path: Path, activation: str) -> None:
    folder, theirs = write_tower(tmp_path, activation=activation)
    ours = load_clip_vision(folder, CPU, torch.float32, "--x", "a tower")
    images = [noise(60, 40), noise(28, 95)]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True
    )
    pixels = torch.stack([torch.as_tensor(processor(image)["pixel_values"][0]) for image in images])
    torch.testing.assert_close(ours.prepare(images), pixels, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode(images), theirs(pixel_values=pixels).image_embeds, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("size", [(60, 40), (28, 95), (64, 64), (20, 20)])
def test_pixels_are_prepared_as_pictures_are(tmp_path: Path, size: tuple[int, int]) -> None:
    """But for the roundings of pictures, and so that gradients flow."""
    tower = load_clip_vision(write_tower(tmp_path)[0], CPU, torch.float32, "--x", "a tower")
    image = noise(*size).point(lambda value: 64 + value // 2)  # Pillow cuts off what overshoots on the way
    pixels = (torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None] / 255).requires_grad_()
    prepared = tower.prepare_pixels(pixels)
    torch.testing.assert_close(prepared, tower.prepare([image]), atol=0.02, rtol=0)
    prepared.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0


def test_a_file_with_both_towers_gives_the_same(tmp_path: Path) -> None:
    folder, theirs = write_tower(tmp_path / "alone")
    beside = {"text_model.final_layer_norm.weight": torch.ones(2), "logit_scale": torch.tensor(2.0)}
    save(tmp_path / "both" / "model.safetensors", {**theirs.state_dict(), **beside})
    config = {"model_type": "clip", "vision_config": json.loads((folder / "config.json").read_text("utf-8"))}
    (tmp_path / "both" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    image = [noise(30, 30)]
    first, second = (
        load_clip_vision(path, CPU, torch.float32, "--x", "a tower").encode(image)
        for path in (folder, tmp_path / "both")
    )
    assert torch.equal(first, second)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"text_model.final_layer_norm.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="is not a CLIP image encoder(.|\n)*Give a tower to --x"):
        load_clip_vision(path, CPU, torch.float32, "--x", "a tower")
