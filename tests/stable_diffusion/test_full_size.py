"""The released files of SD 1.5, 2.1 and XL at full size: names and shapes without data, on the meta device.

Sizes: the published configurations of the three U-Nets, VAEs and text encoders.
"""

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from encoders.clip_checkpoints import ClipTextConfig
from encoders.clip_layers import ClipText
from tests.manifests import TensorList, write_hollow
from tests.stable_diffusion.loaded import load
from tests.tiny.stable_diffusion import RELEASED_UNETS, ldm_unet, ldm_vae, open_clip, tokenizer_folder

META = torch.device("meta")
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = ClipTextConfig(49408, 77, 768, 3072, 12, 12)
VIT_H = ClipTextConfig(49408, 77, 1024, 4096, 16, 24, "gelu")
BIG_G = ClipTextConfig(49408, 77, 1280, 5120, 20, 32, "gelu")
TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}  # of the U-Net


def text(config: ClipTextConfig) -> dict[str, Tensor]:
    names = ClipText(config).state_dict()
    return {f"text_model.{name}": tensor for name, tensor in names.items()}


def released(kind: str) -> dict[str, Tensor]:
    """Names and shapes of a released single file; tensors on the meta device."""
    with META:
        unet = UNet2DConditionModel(**RELEASED_UNETS[kind]).state_dict()
        vae = AutoencoderKL(**VAE).state_dict()
        parts = {"model.diffusion_model.": ldm_unet(unet), "first_stage_model.": ldm_vae(vae)}
        assert len(unet) == TENSORS[kind]
        if kind == "sd1":
            parts["cond_stage_model.transformer."] = text(CLIP_L)
        elif kind == "sd2":
            unused = {"text_projection.weight": torch.empty(1024, 1024)}
            parts["cond_stage_model.model."] = open_clip({**text(VIT_H), **unused})
        else:
            parts["conditioner.embedders.0.transformer."] = text(CLIP_L)
            parts["conditioner.embedders.1.model."] = open_clip(
                {**text(BIG_G), "text_projection.weight": torch.empty(1280, 1280)}
            )
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


@pytest.mark.parametrize("kind", RELEASED_UNETS)
def test_a_released_file_is_recognised_and_fits_as_a_whole(kind: str, tmp_path: Path) -> None:
    tensors: TensorList = {name: ("F16", tuple(one.shape)) for name, one in released(kind).items()}
    path = write_hollow(tmp_path / f"{kind}.safetensors", tensors)

    model = load(
        path, "--tokenizer_cache_dir", tokenizer_folder(tmp_path), "--fp16", "--no_half_vae", device=META
    )

    assert model.kind.name == kind
    assert len(model.unet.state_dict()) == TENSORS[kind]
    theirs = {name: value for name, value in RELEASED_UNETS[kind].items() if name != "attention_head_dim"}
    found = {name: model.unet.config[name] for name in theirs}
    assert found == theirs
    heads = {
        name: one.heads
        for name, one in model.unet.named_modules()
        if name.endswith("attn1") and "transformer_blocks.0" in name
    }
    wanted = {"sd1": {8}, "sd2": {5, 10, 20}, "sdxl": {10, 20}}[kind]
    assert set(heads.values()) == wanted
    layers = [tower.network.num_layers for tower in model.texts]
    assert layers == {"sd1": [12], "sd2": [23], "sdxl": [12, 32]}[kind]
    assert (
        sum(one.numel() for one in model.unet.parameters())
        == {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[kind]
    )
