"""Tiny random HunyuanVideo and SkyReels V1 transformers, as files of every dialect a user may have."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hunyuan_model.configs import HunyuanVideoConfig
from tests.tiny.dit_files import as_fp8, draw, write_dialect

_BASE = HunyuanVideoConfig(
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
)
CONFIGS: dict[str, HunyuanVideoConfig] = {
    "t2v": _BASE,
    "i2v": replace(_BASE, in_dim=32),  # SkyReels V1
    "undistilled": replace(_BASE, has_guidance=False),
}
DIALECTS = (
    "pt",
    "pt_wrapped",
    "safetensors",
    "sharded",
    "prefixed",
    "comfy",
    "comfy_all_in_one",
    "diffusers",
    "diffusers_sharded",
)
FP8_DIALECTS = (
    "fp8",
    "fp8_scaled",
    "fp8_weight_scale",
    "fp8_row_scale",
    "fp8_map",
    "comfy_fp8_scaled",
    "diffusers_fp8_scaled",
)


def tiny_state(
    kind: str = "t2v", seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the published names.

    sizes: fields of the config to change, such as dim=256 or text_dim=64.
    """
    config = replace(CONFIGS[kind], **sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(name, shape, generator).to(dtype) for name, shape in shapes(config).items()}


def shapes(config: HunyuanVideoConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer, written down from the published files."""
    dim, ffn, found = config.dim, config.ffn_dim, dict[str, tuple[int, ...]]()

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)

    found["img_in.proj.weight"], found["img_in.proj.bias"] = (dim, config.in_dim, *config.patch_size), (dim,)
    linear("txt_in.input_embedder", dim, config.text_dim)
    for embedder in ("txt_in.t_embedder", "time_in", *(["guidance_in"] if config.has_guidance else [])):
        linear(f"{embedder}.mlp.0", dim, config.freq_dim)
        linear(f"{embedder}.mlp.2", dim, dim)
    linear("txt_in.c_embedder.linear_1", dim, config.text_dim)
    linear("txt_in.c_embedder.linear_2", dim, dim)
    for block in (
        f"txt_in.individual_token_refiner.blocks.{index}" for index in range(config.refiner_blocks)
    ):
        for norm in ("norm1", "norm2"):
            found[f"{block}.{norm}.weight"] = found[f"{block}.{norm}.bias"] = (dim,)
        linear(f"{block}.self_attn_qkv", 3 * dim, dim)
        linear(f"{block}.self_attn_proj", dim, dim)
        linear(f"{block}.mlp.fc1", config.refiner_ffn_dim, dim)
        linear(f"{block}.mlp.fc2", dim, config.refiner_ffn_dim)
        linear(f"{block}.adaLN_modulation.1", 2 * dim, dim)
    linear("vector_in.in_layer", dim, config.pooled_dim)
    linear("vector_in.out_layer", dim, dim)
    head_width = dim // config.num_heads
    for block in (f"double_blocks.{index}" for index in range(config.double_blocks)):
        for stream in ("img", "txt"):
            linear(f"{block}.{stream}_mod.linear", 6 * dim, dim)
            linear(f"{block}.{stream}_attn_qkv", 3 * dim, dim)
            found[f"{block}.{stream}_attn_q_norm.weight"] = found[f"{block}.{stream}_attn_k_norm.weight"] = (
                head_width,
            )
            linear(f"{block}.{stream}_attn_proj", dim, dim)
            linear(f"{block}.{stream}_mlp.fc1", ffn, dim)
            linear(f"{block}.{stream}_mlp.fc2", dim, ffn)
    for block in (f"single_blocks.{index}" for index in range(config.single_blocks)):
        linear(f"{block}.linear1", 3 * dim + ffn, dim)
        linear(f"{block}.linear2", dim, dim + ffn)
        found[f"{block}.q_norm.weight"] = found[f"{block}.k_norm.weight"] = (head_width,)
        linear(f"{block}.modulation.linear", 3 * dim, dim)
    linear("final_layer.linear", 4 * config.out_dim, dim)
    linear("final_layer.adaLN_modulation.1", 2 * dim, dim)
    return found


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "hunyuan"
) -> Path:
    """Write a transformer as one of DIALECTS or FP8_DIALECTS. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    match dialect:
        case "pt" | "pt_wrapped":
            path = path.with_suffix(".pt")
            torch.save(dict(state) if dialect == "pt" else {"module": dict(state)}, path)
        case "comfy":
            save_file({"model.model." + key: tensor for key, tensor in comfy_state(state).items()}, path)
        case "comfy_all_in_one":
            others = {
                "vae.encoder.conv_in.conv.weight": torch.zeros(2),
                "text_encoders.llama.model.norm.weight": torch.zeros(3),
            }
            save_file(
                {"model.diffusion_model." + key: tensor for key, tensor in comfy_state(state).items()}
                | others,
                path,
            )
        case "fp8_map":
            return _write_fp8_with_map(folder, state)
        case "comfy_fp8_scaled":
            save_file(
                {
                    "model.model." + key: tensor
                    for key, tensor in as_fp8(comfy_state(state), "fp8_scaled").items()
                },
                path,
            )
        case "diffusers_fp8_scaled":
            save_file(as_fp8(diffusers_state(state), "fp8_scaled"), path)
        case _:
            return write_dialect(path, state, dialect, diffusers_state)
    return path


def _write_fp8_with_map(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """As the official fp8 release: the linear layers of the blocks in fp8, their scales in a second file."""
    stored, scales = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.startswith(("double_blocks.", "single_blocks.")):
            scale = tensor.abs().max() / 448  # the largest float8_e4m3fn
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scales[name.removesuffix(".weight")] = scale
        else:
            stored[name] = tensor.to(torch.bfloat16)
    path = folder / "mp_rank_00_model_states_fp8.pt"
    torch.save({"module": stored}, path)
    torch.save(scales, folder / "mp_rank_00_model_states_fp8_map.pt")
    return path


def comfy_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with ComfyUI's names."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in (
            (r"^((?:time_in|guidance_in|txt_in\.t_embedder)\.)mlp\.0", r"\1in_layer"),
            (r"^((?:time_in|guidance_in|txt_in\.t_embedder)\.)mlp\.2", r"\1out_layer"),
            (r"c_embedder\.linear_1", "c_embedder.in_layer"),
            (r"c_embedder\.linear_2", "c_embedder.out_layer"),
            (r"_attn_(qkv|proj)", r"_attn.\1"),
            (r"_attn_q_norm\.weight", "_attn.norm.query_norm.scale"),
            (r"_attn_k_norm\.weight", "_attn.norm.key_norm.scale"),
            (r"^(single_blocks\.\d+)\.q_norm\.weight", r"\1.norm.query_norm.scale"),
            (r"^(single_blocks\.\d+)\.k_norm\.weight", r"\1.norm.key_norm.scale"),
            (r"mlp\.fc1", "mlp.0"),
            (r"mlp\.fc2", "mlp.2"),
            (r"(_mod|modulation)\.linear", r"\1.lin"),
        ):
            name = re.sub(ours, theirs, name)
        renamed[name] = tensor
    return renamed


def diffusers_state(
    state: Mapping[str, Tensor], parts_of: Callable[[str], list[str]] | None = None
) -> dict[str, Tensor]:
    """The same weights in diffusers' layout: fused layers apart, the halves of the last modulation changed
    about. parts_of: names there, if they are not those of HunyuanVideo.
    """
    found: dict[str, Tensor] = {}
    dim = len(state["img_in.proj.weight"])
    for name, tensor in state.items():
        parts = (parts_of or diffusers_parts)(name)
        heights = [dim] * (len(parts) - 1)  # query, key and value are as high as the model is wide
        for part, rows in zip(parts, tensor.split([*heights, len(tensor) - sum(heights)]), strict=True):
            found[part] = (
                torch.cat(rows.chunk(2)[::-1]) if name.startswith("final_layer.adaLN") else rows.contiguous()
            )
    return found


def diffusers_parts(name: str) -> list[str]:
    """The names in diffusers' layout of a published tensor; several where it is fused there."""
    path, _, leaf = name.rpartition(".")
    for pattern, replacement in (
        (r"^img_in\.", "x_embedder."),
        (r"^time_in\.", "time_text_embed.timestep_embedder."),
        (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
        (r"^vector_in\.in_layer", "time_text_embed.text_embedder.linear_1"),
        (r"^vector_in\.out_layer", "time_text_embed.text_embedder.linear_2"),
        (r"^txt_in\.input_embedder", "context_embedder.proj_in"),
        (r"^txt_in\.t_embedder\.", "context_embedder.time_text_embed.timestep_embedder."),
        (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
        (r"^(.*embedder)\.mlp\.0$", r"\1.linear_1"),
        (r"^(.*embedder)\.mlp\.2$", r"\1.linear_2"),
        (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
        (r"(refiner_blocks\.\d+)\.self_attn_proj", r"\1.attn.to_out.0"),
        (r"(refiner_blocks\.\d+)\.self_attn_qkv", r"\1.attn.to_q|to_k|to_v"),
        (r"(refiner_blocks\.\d+)\.adaLN_modulation\.1", r"\1.norm_out.linear"),
        (r"(refiner_blocks\.\d+)\.mlp\.", r"\1.ff."),
        (r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."),
        (r"\.img_mod\.", ".norm1."),
        (r"\.txt_mod\.", ".norm1_context."),
        (r"\.img_attn_qkv$", ".attn.to_q|to_k|to_v"),
        (r"\.txt_attn_qkv$", ".attn.add_q_proj|add_k_proj|add_v_proj"),
        (r"\.img_attn_proj$", ".attn.to_out.0"),
        (r"\.txt_attn_proj$", ".attn.to_add_out"),
        (r"\.img_attn_([qk])_norm$", r".attn.norm_\1"),
        (r"\.txt_attn_([qk])_norm$", r".attn.norm_added_\1"),
        (r"\.img_mlp\.", ".ff."),
        (r"\.txt_mlp\.", ".ff_context."),
        (r"\.fc1$", ".net.0.proj"),
        (r"\.fc2$", ".net.2"),
        (
            r"^single_blocks\.(\d+)\.linear1$",
            r"single_transformer_blocks.\1.attn.to_q|attn.to_k|attn.to_v|proj_mlp",
        ),
        (r"^single_blocks\.(\d+)\.linear2$", r"single_transformer_blocks.\1.proj_out"),
        (r"^single_blocks\.(\d+)\.modulation\.", r"single_transformer_blocks.\1.norm."),
        (r"^single_blocks\.(\d+)\.([qk])_norm$", r"single_transformer_blocks.\1.attn.norm_\2"),
        (r"^final_layer\.linear$", "proj_out"),
        (r"^final_layer\.adaLN_modulation\.1$", "norm_out.linear"),
    ):
        path = re.sub(pattern, replacement, path)
    first, *others = path.split("|")
    if not others:
        return [f"{first}.{leaf}"]
    start = re.match(r".*blocks\.\d+\.", first) if others[-1] == "proj_mlp" else re.match(r".*\.", first)
    assert start is not None
    return [f"{first}.{leaf}", *(f"{start[0]}{other}.{leaf}" for other in others)]
