"""FramePack's image encoder against transformers, and which files it takes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from frame_pack.image_checkpoints import SiglipConfig, read_siglip
from frame_pack.image_encoder import SiglipVision, load_siglip
from modules.checkpoints.filling import load_module
from modules.checkpoints.opening import open_checkpoint
from modules.media.pixels import to_pixels
from tests.manifests import tensor_list, write_hollow
from tests.tiny.framepack_encoders import (
    SIGLIP_DIM,
    siglip_config,
    siglip_layouts,
    siglip_tensors,
)
from tests.tiny.hunyuan_encoders import save

CPU = torch.device("cpu")


def frames(height: int = 37, width: int = 51, batch: int = 1) -> Tensor:
    """Noise as B H W 3 uint8."""
    return torch.randint(
        0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def pixels_of(images: Tensor) -> Tensor:
    """B H W 3 uint8 -> B 3 H W in -1..1."""
    return to_pixels(images[:, None]).squeeze(2)


def tower(path: Path, dtype: torch.dtype = torch.float32) -> SiglipVision:
    return load_siglip(
        save(path / "model.safetensors", siglip_layouts(siglip_tensors())["vision"]), CPU, dtype
    )


# Numbers


@pytest.mark.parametrize(("height", "width"), [(37, 51), (384, 384), (480, 832), (700, 130)])
def test_images_are_prepared_as_by_the_released_processor(tmp_path: Path, height: int, width: int) -> None:
    images = frames(height, width, batch=2)
    processor = SiglipImageProcessorPil(
        size={"height": 384, "width": 384},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = processor.preprocess(list(images.numpy()), return_tensors="pt")["pixel_values"]

    prepared = tower(tmp_path).prepare(pixels_of(images))

    assert prepared.dtype == torch.float32
    # the same 8-bit steps; the way from there to -1..1 is rounded otherwise, by far less than a step of
    # 1/127.5
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)


def test_features_equal_those_of_transformers(tmp_path: Path) -> None:
    config, tensors = siglip_config(), siglip_tensors()
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    ).eval()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in theirs.state_dict()) else ""
    missing, unexpected = theirs.load_state_dict(
        {prefix + name: tensor for name, tensor in tensors.items()}, strict=False
    )
    assert not unexpected
    assert all(".head." in f".{name}" for name in missing)
    siglip = tower(tmp_path)
    pixels = pixels_of(frames(batch=2))

    with torch.no_grad():
        expected = theirs(siglip.prepare(pixels)).last_hidden_state
    features = siglip.encode(pixels)

    assert features.shape == (2, 729, SIGLIP_DIM)
    # float32 throughout: sums in another order
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()


# Files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", siglip_layouts(siglip_tensors()))
def test_every_layout_gives_the_same_weights(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    tensors = siglip_tensors(dtype=dtype)
    siglip = load_siglip(
        save(tmp_path / "model.safetensors", siglip_layouts(tensors)[layout]), CPU, torch.float32
    )
    state = siglip.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
    assert not any(parameter.requires_grad for parameter in siglip.parameters())


def test_the_published_file_fits_at_full_size(tmp_path: Path) -> None:
    tensors = tensor_list("sigclip-vision-384")
    with open_checkpoint(write_hollow(tmp_path / "model.safetensors", tensors)) as checkpoint:
        plan = read_siglip(checkpoint)
        assert plan.config == SiglipConfig(1152, 4304, 16, 27, 384, 14)
        with torch.device("meta"):
            network = SiglipVision(plan.config)
        load_module(  # raises for every leftover
            network,
            plan.checkpoint,
            plan.sources,
            device=torch.device("meta"),
            dtype=lambda _, stored: stored,
            ignore=plan.ignore,
        )
    in_head = [name for name in tensors if name.startswith("vision_model.head.")]
    assert len(network.state_dict()) == len(tensors) - len(in_head)


# Dimensions


# Files that do not fit
