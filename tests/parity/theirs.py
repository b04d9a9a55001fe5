"""Wan2.1's networks as PyPI's diffusers and transformers have them, loaded from the files that are given to
our scripts.

Names are changed by diffusers' own converters, or as the tiny files of transformers are written.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.encoders.their_t5 import their_t5
from tests.tiny.wan_encoders import clip_config, clip_hf_tensors, t5_config, t5_hf_tensors

HEAD_WIDTH = 128
TEXT_LENGTH = 512
# released code, wan/modules/vae.py
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Theirs:
    """The networks of a folder with dit, vae, t5, clip .safetensors and google/umt5-xxl, float32 on the
    CPU.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def dit(self) -> WanTransformer3DModel:
        return load_dit(self.folder / "dit.safetensors")

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        return load_vae(self.folder / "vae.safetensors")

    @cached_property
    def t5(self) -> UMT5EncoderModel:
        return load_t5(self.folder / "t5.safetensors")

    @cached_property
    def clip(self) -> CLIPVisionModel:
        return load_clip(self.folder / "clip.safetensors")

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(str(self.folder / "google" / "umt5-xxl"))

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """n D: a row for each token of the cleaned prompt, at most 512, the end token included."""
        padding = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True}
        tokens = self.tokenizer([prompt_clean(prompt)], **padding, return_tensors="pt")
        rows = self.t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return rows[0, : int(tokens.attention_mask.sum())]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """1 3 F H W in -1..1 -> normalized means of the posterior, 1 16 f h w."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
        return (self.vae.encode(pixels).latent_dist.mode() - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """1 16 f h w -> 1 3 F H W in -1..1."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
        return self.vae.decode((latents * std + mean).to(self.vae.dtype)).sample.clamp(-1, 1)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """1 3 H W in -1..1 at the image's own size -> 1 257 D: before the last block."""
        side = self.clip.config.image_size
        square = nn.functional.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return self.clip((square * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states[-2]


def pad_text(rows: Tensor) -> Tensor:
    """n D -> 1 512 D, zeros behind."""
    return nn.functional.pad(rows, (0, 0, 0, TEXT_LENGTH - len(rows)))[None]


def dit_names(names: list[str]) -> dict[str, str]:
    """Published names of transformer tensors -> those of diffusers."""
    renamed = convert_wan_transformer_to_diffusers(dict(zip(names, map(_Marked, names), strict=True)))
    # the converter does not know it
    special = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
    return {marked.name: special.get(new, new) for new, marked in renamed.items()}


class _Marked:
    """Stands for a tensor while names are converted."""

    def __init__(self, name: str) -> None:
        self.name = name


def load_dit(path: Path) -> WanTransformer3DModel:
    """The transformer of a file; `ref_conv` of Fun-Control v1.1, which needs a reference image, is left
    out.
    """
    return in_diffusers(
        {name: tensor for name, tensor in load_file(path).items() if not name.startswith("ref_conv.")}
    )


def in_diffusers(tensors: Mapping[str, Tensor]) -> WanTransformer3DModel:
    """A transformer of the official names, its sizes read off its tensors."""
    dim, in_channels, *patch = tensors["patch_embedding.weight"].shape
    image = tensors.get("img_emb.proj.0.weight")
    positions = tensors.get("img_emb.emb_pos")
    dit = WanTransformer3DModel(
        patch_size=tuple(patch),
        num_attention_heads=dim // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        in_channels=in_channels,
        out_channels=len(tensors["head.head.bias"]) // math.prod(patch),
        text_dim=tensors["text_embedding.0.weight"].shape[1],
        freq_dim=tensors["time_embedding.0.weight"].shape[1],
        ffn_dim=tensors["blocks.0.ffn.0.weight"].shape[0],
        num_layers=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        image_dim=None if image is None else len(image),
        added_kv_proj_dim=None if image is None else dim,
        pos_embed_seq_len=None if positions is None else positions.shape[1],
    )
    names = dit_names(list(tensors))
    dit.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})
    return dit.eval().requires_grad_(False)


def load_vae(path: Path) -> AutoencoderKLWan:
    """A VAE of the official names."""
    tensors = load_file(path)
    vae = AutoencoderKLWan(
        base_dim=len(tensors["encoder.conv1.bias"]), z_dim=16, latents_mean=MEAN, latents_std=STD
    )
    vae.load_state_dict(convert_wan_vae_to_diffusers(tensors))
    return vae.eval().requires_grad_(False)


def load_t5(path: Path) -> UMT5EncoderModel:
    """An umT5 encoder of the official names, as large as all tiny ones."""
    return their_t5(t5_config(), t5_hf_tensors(load_file(path)), UMT5EncoderModel, UMT5Config)


def load_clip(path: Path) -> CLIPVisionModel:
    """The `visual.` half of the official CLIP file, as large as all tiny ones."""
    tensors = {
        name.removeprefix("visual."): tensor
        for name, tensor in load_file(path).items()
        if name.startswith("visual.")
    }
    config = clip_config()
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers + 1,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
        )
    )
    renamed = clip_hf_tensors(tensors)
    del renamed["visual_projection.weight"]
    if not any(name.startswith("vision_model.") for name in clip.state_dict()):
        renamed = {name.removeprefix("vision_model."): tensor for name, tensor in renamed.items()}
    missing, unexpected = clip.load_state_dict(renamed, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "position_ids" not in name], missing
    return clip.eval().requires_grad_(False)
