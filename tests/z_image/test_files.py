"""What only files of Z-Image have: weights joined in 8 bits, and relatives that are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

from modules.errors import CheckpointError
from modules.speed_options import Quantization
from protocols.loading import Placement
from tests.manifests import write_hollow
from tests.tiny.z_image import CONFIG, comfy_state, tiny_state, write_dit
from z_image.files import load_dit

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))


@pytest.mark.parametrize("form", ["fp8", "fp8_scaled", "fp8_row_scale"])
def test_a_joined_weight_in_8_bits_is_cut_in_8_bits(tmp_path: Path, form: str) -> None:
    """Each part with its rows of the scale: it computes what the weight in 16 bits does."""
    path = write_dit(tmp_path, comfy_state(tiny_state()), form)
    kept = load_dit(path, Placement(torch.device("cpu"), quantization=Quantization("cast")))
    wide = load_dit(path, CPU)
    x = torch.randn(3, CONFIG.dim, generator=torch.Generator().manual_seed(0)).bfloat16()

    for character in "qkv":
        name = f"layers.1.attention.to_{character}"
        assert kept.get_parameter(f"{name}.weight").dtype == torch.float8_e4m3fn
        found, expected = kept.get_submodule(name)(x), wide.get_submodule(name)(x)
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("network", "settings", "words"),
    [
        (ZImageTransformer2DModel, {"siglip_feat_dim": 16, "n_layers": 1}, "Z-Image-Omni"),
        (
            ZImageControlNetModel,
            {"n_refiner_layers": 1, "control_layers_places": [0], "control_in_dim": 16},
            "a ControlNet of Z-Image",
        ),
    ],
)
def test_relatives_are_refused_by_name(
    network: type, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        names = network(**settings).state_dict()
    path = write_hollow(
        tmp_path / "dit.safetensors", {name: ("BF16", list(one.shape)) for name, one in names.items()}
    )
    with pytest.raises(CheckpointError, match=rf"{words}.*not supported yet(.|\n)*--dit"):
        load_dit(path, META)


def test_a_relative_of_pixels_is_refused(tmp_path: Path) -> None:
    state = {**tiny_state(), "all_x_embedder.2-1.weight": torch.zeros(CONFIG.dim, 12)}
    with pytest.raises(CheckpointError, match="takes 3 channels.*such as Zeta-Chroma or L2P"):
        load_dit(write_dit(tmp_path, state), CPU)
