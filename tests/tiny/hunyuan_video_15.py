"""A complete tiny HunyuanVideo 1.5 on disk, in the released file layouts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_video_15.configs import IN_CHANNELS, LATENT_CHANNELS, HunyuanVideo15Config
from hunyuan_video_15.model import HunyuanVideo15Model
from hunyuan_video_15.vae import HunyuanVideo15Vae, HunyuanVideo15VaeConfig
from tests.tiny.dit_files import draw_state, write_dialect
from tests.tiny.framepack import SIGLIP_DIM, write_siglip
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_image import GLYPH_DIM, byt5_state
from tests.tiny.language_models import DIM, qwen25_vl, write_model, write_qwen_tokenizer

CONFIG = HunyuanVideo15Config(
    dim=128,
    ffn_dim=512,
    num_heads=2,
    double_blocks=2,
    single_blocks=0,
    refiner_blocks=2,
    refiner_ffn_dim=512,
    in_dim=IN_CHANNELS,
    out_dim=LATENT_CHANNELS,
    text_dim=DIM,
    glyph_dim=GLYPH_DIM,
    glyph_hidden=(48, 48),
    image_dim=SIGLIP_DIM,
)
# narrow where frames are large; the encoder averages 128 channels into 64 moments
VAE = HunyuanVideo15VaeConfig(LATENT_CHANNELS, (16, 16, 32, 64, 64), 2, 3)
DIALECTS = ("safetensors", "sharded", "prefixed", "comfy", "comfy_model", "diffusers", "diffusers_sharded")


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: HunyuanVideo15Model(config), seed, dtype)


_RENAMED = (  # released name, diffusers' name
    (r"img_in\.proj\.(\w+)", r"x_embedder.proj.\1"),
    (r"vision_in\.proj\.0\.(\w+)", r"image_embedder.norm_in.\1"),
    (r"vision_in\.proj\.1\.(\w+)", r"image_embedder.linear_1.\1"),
    (r"vision_in\.proj\.3\.(\w+)", r"image_embedder.linear_2.\1"),
    (r"vision_in\.proj\.4\.(\w+)", r"image_embedder.norm_out.\1"),
    (r"byt5_in\.layernorm\.(\w+)", r"context_embedder_2.norm.\1"),
    (r"byt5_in\.fc(\d)\.(\w+)", r"context_embedder_2.linear_\1.\2"),
    (r"time_in\.mlp\.0\.(\w+)", r"time_embed.timestep_embedder.linear_1.\1"),
    (r"time_in\.mlp\.2\.(\w+)", r"time_embed.timestep_embedder.linear_2.\1"),
    (r"cond_type_embedding\.weight", r"cond_type_embed.weight"),
    (r"final_layer\.linear\.(\w+)", r"proj_out.\1"),
    (r"txt_in\.input_embedder\.(\w+)", r"context_embedder.proj_in.\1"),
    (
        r"txt_in\.t_embedder\.mlp\.0\.(\w+)",
        r"context_embedder.time_text_embed.timestep_embedder.linear_1.\1",
    ),
    (
        r"txt_in\.t_embedder\.mlp\.2\.(\w+)",
        r"context_embedder.time_text_embed.timestep_embedder.linear_2.\1",
    ),
    (r"txt_in\.c_embedder\.(\w+)\.(\w+)", r"context_embedder.time_text_embed.text_embedder.\1.\2"),
    (r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.(.+)", r"REFINER.\1.\2"),
    (r"REFINER\.(\d+)\.self_attn_proj\.(\w+)", r"REFINER.\1.attn.to_out.0.\2"),
    (r"REFINER\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"REFINER.\1.norm_out.linear.\2"),
    (r"REFINER\.(\d+)\.mlp\.fc1\.(\w+)", r"REFINER.\1.ff.net.0.proj.\2"),
    (r"REFINER\.(\d+)\.mlp\.fc2\.(\w+)", r"REFINER.\1.ff.net.2.\2"),
    (r"REFINER\.(.+)", r"context_embedder.token_refiner.refiner_blocks.\1"),
    (r"double_blocks\.(\d+)\.(.+)", r"transformer_blocks.\1.\2"),
    (r"(transformer_blocks\.\d+)\.img_mod\.(.+)", r"\1.norm1.\2"),
    (r"(transformer_blocks\.\d+)\.txt_mod\.(.+)", r"\1.norm1_context.\2"),
    (r"(transformer_blocks\.\d+)\.img_attn_([qkv])\.(\w+)", r"\1.attn.to_\2.\3"),
    (r"(transformer_blocks\.\d+)\.txt_attn_([qkv])\.(\w+)", r"\1.attn.add_\2_proj.\3"),
    (r"(transformer_blocks\.\d+)\.img_attn_([qk])_norm\.(\w+)", r"\1.attn.norm_\2.\3"),
    (r"(transformer_blocks\.\d+)\.txt_attn_([qk])_norm\.(\w+)", r"\1.attn.norm_added_\2.\3"),
    (r"(transformer_blocks\.\d+)\.img_attn_proj\.(\w+)", r"\1.attn.to_out.0.\2"),
    (r"(transformer_blocks\.\d+)\.txt_attn_proj\.(\w+)", r"\1.attn.to_add_out.\2"),
    (r"(transformer_blocks\.\d+)\.img_mlp\.fc1\.(\w+)", r"\1.ff.net.0.proj.\2"),
    (r"(transformer_blocks\.\d+)\.img_mlp\.fc2\.(\w+)", r"\1.ff.net.2.\2"),
    (r"(transformer_blocks\.\d+)\.txt_mlp\.fc1\.(\w+)", r"\1.ff_context.net.0.proj.\2"),
    (r"(transformer_blocks\.\d+)\.txt_mlp\.fc2\.(\w+)", r"\1.ff_context.net.2.\2"),
)


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout: the refiner's qkv apart, the last layer's halves swapped."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = tensor.chunk(2)
            found[f"norm_out.linear.{name.rpartition('.')[2]}"] = torch.cat([scale, shift])
            continue
        for pattern, theirs in _RENAMED:
            name = re.sub(f"^{pattern}$", theirs, name)
        match = re.fullmatch(r"(.+)\.self_attn_qkv\.(\w+)", name)
        if match is None:
            found[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            found[f"{match[1]}.attn.to_{letter}.{match[2]}"] = part.contiguous()
    return found


def comfy_state(state: Mapping[str, Tensor], as_in_the_model: bool = False) -> dict[str, Tensor]:
    """The same weights as ComfyUI repackages them: queries, keys and values of a stream in one.

    as_in_the_model: with the names of ComfyUI's network, as it saves merged models.
    """
    found = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(double_blocks\.\d+\.(?:img|txt)_attn)_([qkv])\.(\w+)", name)
        if match is None:
            found[name] = tensor
        elif match[2] == "q":
            parts = [state[f"{match[1]}_{letter}.{match[3]}"] for letter in "qkv"]
            found[f"{match[1]}_qkv.{match[3]}"] = torch.cat(parts)
    if not as_in_the_model:
        return found
    renamed = {}
    for name, tensor in found.items():
        name = re.sub(r"_attn_(qkv|proj)\.", r"_attn.\1.", name)
        name = re.sub(r"_attn_q_norm\.weight", "_attn.norm.query_norm.weight", name)
        name = re.sub(r"_attn_k_norm\.weight", "_attn.norm.key_norm.weight", name)
        name = re.sub(r"mlp\.fc1\.", "mlp.0.", name)
        name = re.sub(r"mlp\.fc2\.", "mlp.2.", name)
        name = re.sub(r"_mod\.linear\.", "_mod.lin.", name)
        name = re.sub(r"(time_in|t_embedder)\.mlp\.0\.", r"\1.in_layer.", name)
        name = re.sub(r"(time_in|t_embedder)\.mlp\.2\.", r"\1.out_layer.", name)
        name = name.replace("c_embedder.linear_1.", "c_embedder.in_layer.")
        renamed[name.replace("c_embedder.linear_2.", "c_embedder.out_layer.")] = tensor
    return renamed


def write_dit(
    folder: Path,
    state: Mapping[str, Tensor],
    dialect: str = "safetensors",
    name: str = "hunyuanvideo1.5_480p_t2v",
) -> Path:
    """Write a transformer as one of DIALECTS. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    if dialect.startswith("comfy"):
        return save(path, comfy_state(state, as_in_the_model=dialect == "comfy_model"))
    return write_dialect(path, state, dialect, diffusers_state)


def vae_state(seed: int = 5, config: HunyuanVideo15VaeConfig = VAE) -> dict[str, Tensor]:
    """Random weights of a VAE under the released names."""
    found = draw_state(lambda: HunyuanVideo15Vae(config), seed)
    for name, tensor in found.items():
        if name.endswith(".gamma"):
            found[name] = 1 + 0.1 * tensor.sign()
        elif re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            found[name] = tensor[..., None, None, None]
    found["encoder.conv_out.conv.bias"][config.latent_channels :] -= 8  # little noise in a sample
    return found


def diffusers_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same VAE with the names of diffusers."""
    found = {}
    for name, tensor in state.items():
        for ours, theirs in (
            (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
            (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
            (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
            (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
            (r"mid\.block_1\.", "mid_block.resnets.0."),
            (r"mid\.block_2\.", "mid_block.resnets.1."),
            (r"mid\.attn_1\.(norm|proj_out)\.", r"mid_block.attentions.0.\1."),
            (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
        ):
            name = re.sub(ours, theirs, name)
        found[name] = tensor
    return found


def write_vae(path: Path, seed: int = 5) -> Path:
    """A tiny hunyuanvideo15_vae_fp16.safetensors, in float32."""
    return save(path, vae_state(seed))


def write_qwen(folder: Path) -> Path:
    """Write Qwen2.5-VL and its tokenizer into a folder. Returns it."""
    write_qwen_tokenizer(folder)
    return write_model(folder / "model.safetensors", qwen25_vl()).parent


@dataclass(frozen=True)
class TinyHunyuanVideo15:
    """Paths of a tiny checkpoint set, as given to --dit, --vae, --text_encoder, --byt5, --image_encoder."""

    dit: Path
    vae: Path
    text_encoder: Path
    byt5: Path
    image_encoder: Path

    @property
    def texts(self) -> list[str]:
        """The options that name the text encoders."""
        return ["--text_encoder", str(self.text_encoder), "--byt5", str(self.byt5)]

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation from text."""
        return ["--dit", str(self.dit), "--vae", str(self.vae), *self.texts]


def write_tiny_hunyuan_video_15(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: int
) -> TinyHunyuanVideo15:
    """Write transformer, VAE, text encoders and image encoder below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    return TinyHunyuanVideo15(
        dit=write_dit(folder, tiny_state(dtype=dtype, **sizes), name=name),
        vae=write_vae(folder / "vae.safetensors"),
        text_encoder=write_qwen(folder / "text_encoder"),
        byt5=save(folder / "byt5.safetensors", byt5_state()),
        image_encoder=write_siglip(folder / "siglip.safetensors"),
    )
