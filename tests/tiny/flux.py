"""Tiny random FLUX.1 and Chroma models on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flux.configs import ApproximatorConfig, FluxConfig
from flux.model import FluxModel
from tests.tiny.dit_files import draw_state, write_dialect
from tests.tiny.hunyuan_encoders import CLIP_DIM
from tests.tiny.picture_encoders import T5_DIM, write_autoencoder, write_clip_l, write_t5xxl

_BASE = FluxConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    double_blocks=2,
    single_blocks=3,
    token_dim=64,
    text_dim=48,
    pooled_dim=24,
)
CONFIGS = {
    "dev": replace(_BASE, has_guidance=True),
    "schnell": _BASE,
    "chroma": replace(_BASE, pooled_dim=0, approximator=ApproximatorConfig(64, 80, 5)),
}


def tiny_state(
    kind: str = "dev", seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the published names. sizes: fields of the config to change."""
    config = replace(CONFIGS[kind], **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: FluxModel(config), seed, dtype)


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout: fused layers apart, halves of the last modulation exchanged."""
    found: dict[str, Tensor] = {}
    dim = len(state["img_in.weight"])
    for name, tensor in state.items():
        parts = diffusers_parts(name)
        heights = [dim] * (len(parts) - 1)
        for part, rows in zip(parts, tensor.split([*heights, len(tensor) - sum(heights)]), strict=True):
            found[part] = torch.cat(rows.chunk(2)[::-1]) if "norm_out" in part else rows.contiguous()
    return found


_BLOCK_NAMES = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "modulation.lin": "norm.linear",
}
_NAMES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}


def diffusers_parts(name: str) -> list[str]:
    """The names in diffusers' layout of a published tensor; several where it is fused there."""
    path, _, leaf = name.rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf
    if path.startswith("distilled_guidance_layer."):
        return [f"{path.replace('in_layer', 'linear_1').replace('out_layer', 'linear_2')}.{leaf}"]
    kind, _, rest = path.partition("_blocks.")
    if not rest:
        return [f"{_NAMES[path]}.{leaf}"]
    number, _, module = rest.partition(".")
    start = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    return [f"{start}.{number}.{part}.{leaf}" for part in _BLOCK_NAMES[module].split()]


def write_dit(
    folder: Path,
    state: Mapping[str, Tensor],
    dialect: str = "safetensors",
    name: str = "flux",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    return write_dialect(folder / f"{name}.safetensors", state, dialect, diffusers_state)


@dataclass(frozen=True)
class TinyFlux:
    """Paths of a tiny checkpoint set, as given to --dit, --ae, --clip_l and --t5xxl."""

    dit: Path
    ae: Path
    clip_l: Path | None
    t5xxl: Path

    @property
    def encoders(self) -> list[str]:
        """The options that name autoencoder and text encoders, all in float32."""
        clip = [] if self.clip_l is None else ["--clip_l", str(self.clip_l)]
        return ["--ae", str(self.ae), "--vae_dtype", "float32", *clip, "--t5xxl", str(self.t5xxl)]

    @property
    def models(self) -> list[str]:
        """The options that name the models of a generation."""
        return ["--dit", str(self.dit), *self.encoders]


def write_tiny_flux(
    folder: Path, kind: str = "dev", dtype: torch.dtype = torch.float32, **sizes: int
) -> TinyFlux:
    """Write transformer, autoencoder and text encoders with their tokenizers below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pooled = {} if kind == "chroma" else {"pooled_dim": CLIP_DIM}
    state = tiny_state(kind, dtype=dtype, text_dim=T5_DIM, **pooled, **sizes)
    return TinyFlux(
        write_dit(folder, state, name="dit"),
        write_autoencoder(folder / "ae.safetensors"),
        None if kind == "chroma" else write_clip_l(folder),
        write_t5xxl(folder),
    )
