"""Tiny random Wan2.1 transformers, as files of every dialect a user may have."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny.dit_files import draw, write_dialect
from wan.configs import WanConfig

Shapes = dict[str, tuple[int, ...]]

_BASE = WanConfig(
    dim=128, ffn_dim=256, freq_dim=32, text_dim=32, num_heads=1, num_layers=2, in_dim=16, out_dim=16
)
CONFIGS: dict[str, WanConfig] = {
    "t2v": _BASE,
    "i2v": replace(_BASE, in_dim=36, has_image=True),
    "flf2v": replace(_BASE, in_dim=36, has_image=True, image_positions=514),
    "fun-control": replace(_BASE, in_dim=48, has_image=True),
    "fun-control-v1.1": replace(_BASE, in_dim=48, has_image=True, has_ref_conv=True),
    "i2v-2.2": replace(_BASE, in_dim=36),
    "ti2v": replace(_BASE, in_dim=48, out_dim=48),
    "fun-control-2.2": replace(_BASE, in_dim=52),
    "vace": replace(_BASE, num_layers=4, vace_layers=2, vace_dim=96),
    "camera": replace(_BASE, in_dim=32, has_image=True),
}
DIALECTS = (
    "pth",
    "pth_wrapped",
    "safetensors",
    "sharded",
    "prefixed",
    "all_in_one",
    "compiled",
    "diffusers",
    "diffusers_sharded",
)
FP8_DIALECTS = ("fp8", "fp8_scaled", "fp8_weight_scale", "fp8_row_scale")


def tiny_state(
    kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the published names.

    sizes: fields of WanConfig to change, such as dim=256 or text_dim=64.
    """
    config = replace(CONFIGS[kind], **sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return {
        name: draw(name, shape, generator).to(dtype)
        for name, shape in shapes(config, kind == "camera").items()
    }


def shapes(config: WanConfig, camera: bool = False) -> Shapes:
    """Names and shapes of a transformer, written down from the published files."""
    dim, found = config.dim, Shapes()

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)

    found["patch_embedding.weight"], found["patch_embedding.bias"] = (
        (dim, config.in_dim, *config.patch_size),
        (dim,),
    )
    for name, rows, columns in (
        ("text_embedding.0", dim, config.text_dim),
        ("text_embedding.2", dim, dim),
        ("time_embedding.0", dim, config.freq_dim),
        ("time_embedding.2", dim, dim),
        ("time_projection.1", 6 * dim, dim),
        ("head.head", config.out_dim * 4, dim),
    ):
        linear(name, rows, columns)
    found["head.modulation"] = (1, 2, dim)
    stacks = {"blocks": config.num_layers, "vace_blocks": config.vace_layers}
    for block in (f"{name}.{index}" for name, count in stacks.items() for index in range(count)):
        found[f"{block}.modulation"] = (1, 6, dim)
        found[f"{block}.norm3.weight"] = found[f"{block}.norm3.bias"] = (dim,)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", dim, dim)
            found[f"{block}.{attention}.norm_q.weight"] = found[f"{block}.{attention}.norm_k.weight"] = (dim,)
        if config.has_image:
            linear(f"{block}.cross_attn.k_img", dim, dim)
            linear(f"{block}.cross_attn.v_img", dim, dim)
            found[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
        linear(f"{block}.ffn.0", config.ffn_dim, dim)
        linear(f"{block}.ffn.2", dim, config.ffn_dim)
    if config.vace_layers:
        patches = (dim, config.vace_dim, *config.patch_size)
        found["vace_patch_embedding.weight"], found["vace_patch_embedding.bias"] = patches, (dim,)
        linear("vace_blocks.0.before_proj", dim, dim)
        for index in range(config.vace_layers):
            linear(f"vace_blocks.{index}.after_proj", dim, dim)
    if config.has_image:
        width = config.image_dim
        found["img_emb.proj.0.weight"] = found["img_emb.proj.0.bias"] = (width,)
        linear("img_emb.proj.1", width, width)
        linear("img_emb.proj.3", dim, width)
        found["img_emb.proj.4.weight"] = found["img_emb.proj.4.bias"] = (dim,)
    if config.image_positions:
        found["img_emb.emb_pos"] = (1, config.image_positions, config.image_dim)
    if config.has_ref_conv:
        found["ref_conv.weight"], found["ref_conv.bias"] = (dim, 16, 2, 2), (dim,)
    if camera:
        found["control_adapter.conv.weight"], found["control_adapter.conv.bias"] = (dim, 64, 2, 2), (dim,)
    return found


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "wan"
) -> Path:
    """Write a transformer as one of DIALECTS or FP8_DIALECTS. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    match dialect:
        case "pth" | "pth_wrapped":
            path = path.with_suffix(".pth")
            torch.save(dict(state) if dialect == "pth" else {"module": dict(state), "step": 7}, path)
        case "compiled":
            save_file({"_orig_mod." + key: tensor for key, tensor in state.items()}, path)
        case "all_in_one":
            other = {
                "vae.encoder.conv1.weight": torch.zeros(2),
                "text_encoders.t5xxl.shared.weight": torch.zeros(3),
            }
            save_file({"model.diffusion_model." + key: tensor for key, tensor in state.items()} | other, path)
        case _:
            return write_dialect(path, state, dialect, diffusers_state)
    return path


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout."""
    return {diffusers_name(name): tensor for name, tensor in state.items()}


def diffusers_name(name: str) -> str:
    """A published name in diffusers' layout."""
    for pattern, replacement in (
        (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"^time_projection\.1", "condition_embedder.time_proj"),
        (r"^img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
        (r"^img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"^img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
        (r"^img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
        (r"^img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        (r"^head\.head", "proj_out"),
        (r"\.before_proj\.", ".proj_in."),
        (r"\.after_proj\.", ".proj_out."),
        (r"^((?:vace_)?blocks\.\d+|head)\.modulation", r"\1.scale_shift_table"),
        (r"^head\.scale_shift_table", "scale_shift_table"),
        (r"\.norm3\.", ".norm2."),
        (r"\.norm_k_img\.", ".norm_added_k."),
        (r"\.cross_attn\.([kv])_img\.", r".attn2.add_\1_proj."),
        (r"_attn\.([qkv])\.", r"_attn.to_\1."),
        (r"_attn\.o\.", "_attn.to_out.0."),
        (r"\.self_attn\.", ".attn1."),
        (r"\.cross_attn\.", ".attn2."),
        (r"\.ffn\.0\.", ".ffn.net.0.proj."),
        (r"\.ffn\.2\.", ".ffn.net.2."),
    ):
        name = re.sub(pattern, replacement, name)
    return name
