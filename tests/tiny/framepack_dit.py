"""Tiny random FramePack transformers, as files of every dialect a user may have."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from frame_pack.configs import FramePackConfig
from tests.tiny.dit_files import draw, write_dialect

CONFIG = FramePackConfig(
    dim=128,
    ffn_dim=320,
    num_heads=2,
    double_blocks=2,
    single_blocks=3,
    refiner_blocks=2,
    refiner_ffn_dim=512,
    in_dim=16,
    out_dim=16,
    text_dim=48,
    pooled_dim=24,
    image_dim=40,
    image_hidden_dim=384,
)
DIALECTS = ("safetensors", "folder", "sharded", "prefixed", "all_in_one")
FP8_DIALECTS = ("fp8", "fp8_scaled", "fp8_weight_scale", "fp8_row_scale")


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the published names.

    sizes: fields of the config to change, such as dim=256 or text_dim=64.
    """
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(name, shape, generator).to(dtype) for name, shape in shapes(config).items()}


def shapes(config: FramePackConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer, written down from the published files."""
    dim, head_width, found = config.dim, config.dim // config.num_heads, dict[str, tuple[int, ...]]()

    def linear(name: str, rows: int, *columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, *columns), (rows,)

    def embedder(name: str, columns: int) -> None:
        linear(f"{name}.linear_1", dim, columns)
        linear(f"{name}.linear_2", dim, dim)

    def feed_forward(name: str, hidden: int) -> None:
        linear(f"{name}.net.0.proj", hidden, dim)
        linear(f"{name}.net.2", dim, hidden)

    def norms(block: str, *names: str) -> None:
        for name in names:
            found[f"{block}.attn.{name}.weight"] = (head_width,)

    def square(block: str, *names: str) -> None:
        for name in names:
            linear(f"{block}.attn.{name}", dim, dim)

    frames, rows, columns = config.patch_size
    linear("x_embedder.proj", dim, config.in_dim, frames, rows, columns)
    for ending, times in (("", 1), ("_2x", 2), ("_4x", 4)):
        linear(
            f"clean_x_embedder.proj{ending}",
            dim,
            config.in_dim,
            times * frames,
            times * rows,
            times * columns,
        )
    embedder("context_embedder.time_text_embed.timestep_embedder", config.freq_dim)
    embedder("context_embedder.time_text_embed.text_embedder", config.text_dim)
    linear("context_embedder.proj_in", dim, config.text_dim)
    for block in (
        f"context_embedder.token_refiner.refiner_blocks.{index}" for index in range(config.refiner_blocks)
    ):
        for norm in ("norm1", "norm2"):
            found[f"{block}.{norm}.weight"] = found[f"{block}.{norm}.bias"] = (dim,)
        square(block, "to_q", "to_k", "to_v", "to_out.0")
        feed_forward(f"{block}.ff", config.refiner_ffn_dim)
        linear(f"{block}.norm_out.linear", 2 * dim, dim)
    embedder("time_text_embed.timestep_embedder", config.freq_dim)
    embedder("time_text_embed.guidance_embedder", config.freq_dim)
    embedder("time_text_embed.text_embedder", config.pooled_dim)
    linear("image_projection.up", config.image_hidden_dim, config.image_dim)
    linear("image_projection.down", dim, config.image_hidden_dim)
    for block in (f"transformer_blocks.{index}" for index in range(config.double_blocks)):
        linear(f"{block}.norm1.linear", 6 * dim, dim)
        linear(f"{block}.norm1_context.linear", 6 * dim, dim)
        square(
            block, "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
        )
        norms(block, "norm_q", "norm_k", "norm_added_q", "norm_added_k")
        feed_forward(f"{block}.ff", config.ffn_dim)
        feed_forward(f"{block}.ff_context", config.ffn_dim)
    for block in (f"single_transformer_blocks.{index}" for index in range(config.single_blocks)):
        square(block, "to_q", "to_k", "to_v")
        norms(block, "norm_q", "norm_k")
        linear(f"{block}.norm.linear", 3 * dim, dim)
        linear(f"{block}.proj_mlp", config.ffn_dim, dim)
        linear(f"{block}.proj_out", dim, dim + config.ffn_dim)
    linear("norm_out.linear", 2 * dim, dim)
    linear("proj_out", 4 * config.out_dim, dim)
    return found


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "framepack"
) -> Path:
    """Write a transformer as one of DIALECTS or FP8_DIALECTS. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    match dialect:
        case "folder":  # as the official repository lies on disk
            return write_dialect(path, state, "sharded", dict).parent
        case "all_in_one":
            others = {
                "vae.encoder.conv_in.conv.weight": torch.zeros(2),
                "text_encoders.llama.model.norm.weight": torch.zeros(3),
            }
            save_file(
                {"model.diffusion_model." + key: tensor for key, tensor in state.items()} | others, path
            )
        case _:
            return write_dialect(path, state, dialect, dict)
    return path
