"""Tiny parts of LTX-2, here and in diffusers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ltx_2.configs import LtxConfig, StreamConfig
from ltx_2.model import LtxModel
from ltx_2.names import LTX_2
from tests.tiny.dit_files import draw, write_dialect

_VIDEO, _AUDIO = StreamConfig(56, 224, 8, 20), StreamConfig(32, 128, 32, 20)
DIT_CONFIGS = {
    "2.0": LtxConfig(
        _VIDEO, _AUDIO, 4, 2, 32, projects_text=True, has_head_gates=False, modulates_text=False
    ),
    "2.3": LtxConfig(
        replace(_VIDEO, text_dim=56),
        replace(_AUDIO, text_dim=32),
        *(4, 2, 32),
        projects_text=False,
        has_head_gates=True,
        modulates_text=True,
    ),
}
DIT_CONFIGS["2.5"] = replace(
    DIT_CONFIGS["2.3"],
    video=replace(DIT_CONFIGS["2.3"].video, ff_bias=False),
    modulates_text_by_timestep=False,
    has_single_frame_embedding=True,
)


def dit_state(
    version: str = "2.3", seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any
) -> dict[str, Tensor]:
    """Random weights under the published names. sizes: fields of the config to change.

    Without sound the others are the same.
    """
    wanted = replace(DIT_CONFIGS[version], **sizes)
    with torch.device("meta"):
        shapes = LtxModel(replace(wanted, audio=wanted.audio or DIT_CONFIGS[version].audio)).state_dict()
        names = LtxModel(wanted).state_dict().keys()
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: draw(name, tuple(one.shape), generator).to(dtype) for name, one in shapes.items()}
    return {name: drawn[name] for name in names}


def tiny_dit(version: str = "2.3", **sizes: Any) -> LtxModel:
    """Our network with the weights of `dit_state`."""
    model = LtxModel(replace(DIT_CONFIGS[version], **sizes))
    model.load_state_dict(dit_state(version, **sizes))
    return model.eval().requires_grad_(False)


def dit_diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under diffusers' names."""
    table = {ours: theirs for theirs, ours in (*LTX_2.aliases, *LTX_2.parameters)}
    found = {}
    for name, tensor in state.items():
        template = re.sub(r"^(transformer_blocks)\.\d+", r"\1.{n}", name)
        number = re.search(r"\d+", name)
        path, _, leaf = template.rpartition(".")
        theirs = table[template] if template in table else f"{table[path]}.{leaf}"
        found[theirs.replace("{n}", number[0]) if number else theirs] = tensor
    return found


def dit_in_diffusers(
    version: str, state: Mapping[str, Tensor], rope: str = "split", config: LtxConfig | None = None
) -> Any:
    """diffusers' network with these weights. config: its sizes; None: those of `DIT_CONFIGS`."""
    from diffusers import LTX2VideoTransformer3DModel  # slow: most tests that use this file need only ours

    config = config or DIT_CONFIGS[version]
    assert config.audio is not None
    is_new = config.has_head_gates
    model = LTX2VideoTransformer3DModel(
        in_channels=config.video.channels,
        out_channels=config.video.channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        cross_attention_dim=config.dim,
        gated_attn=is_new,
        cross_attn_mod=is_new,
        audio_in_channels=config.audio.channels,
        audio_out_channels=config.audio.channels,
        audio_num_attention_heads=config.num_heads,
        audio_attention_head_dim=config.audio.dim // config.num_heads,
        audio_cross_attention_dim=config.audio.dim,
        audio_gated_attn=is_new,
        audio_cross_attn_mod=is_new,
        num_layers=config.num_layers,
        caption_channels=config.video.text_dim,
        rope_type=rope,
        use_prompt_embeddings=not is_new,
        perturbed_attn=True,
        ff_bias=config.video.ff_bias,
        audio_ff_bias=config.audio.ff_bias,
        use_prompt_adaln_single=config.modulates_text_by_timestep,
        use_keyframes_abs_pos_embedding=config.has_single_frame_embedding,
    )
    model.load_state_dict(dit_diffusers_state(state))
    model.register_forward_pre_hook(_mark_first, with_kwargs=True)
    return model.eval().requires_grad_(False)


def _mark_first(model: Any, _: Any, given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Mark the tokens of the first latent frame, as the official code does; diffusers' pipelines do not."""
    hidden = given["hidden_states"]
    mask = hidden.new_zeros(len(hidden), hidden.shape[1], 1)
    mask[:, : given["height"] * given["width"]] = 1
    return (), {**given, "video_keyframes_mask": mask}


def dit_inputs(
    version: str = "2.3",
    size: Sequence[int] = (3, 4, 5, 6),
    batch: int = 2,
    fps: float = 24.0,
    moments: int = 7,
    config: LtxConfig | None = None,
) -> dict[str, Any]:
    """Inputs of our network. size: latent frames, rows, columns, tokens of the texts. moments: of sound."""
    config, generator = config or DIT_CONFIGS[version], torch.Generator().manual_seed(7)
    assert config.audio is not None
    times, (*grid, text) = torch.linspace(700.0, 310.0, batch), size
    return {
        "noisy": torch.randn(batch, config.video.channels, *grid, generator=generator),
        "timesteps": times,
        "text": torch.randn(batch, text, config.video.text_dim, generator=generator),
        "fps": fps,
        "audio": torch.randn(batch, config.audio.channels // 16, moments, 16, generator=generator),
        "audio_timesteps": times,
        "audio_text": torch.randn(batch, text, config.audio.text_dim, generator=generator),
    }


def write_dit(folder: Path, version: str = "2.3", layout: str = "safetensors", **settings: Any) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`, or as "official": beside all other parts.

    settings: in the record, instead of those of `DIT_CONFIGS`. Returns what a user gives to --dit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, state = folder / "ltx2.safetensors", dit_state(version)
    config = {"num_attention_heads": DIT_CONFIGS[version].num_heads, "av_ca_timestep_scale_multiplier": 1000}
    if layout == "official":
        others = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.")
        beside = {f"{other}x.weight": torch.zeros(1) for other in others}
        registers = "model.diffusion_model.audio_embeddings_connector.learnable_registers"
        full = {f"model.diffusion_model.{name}": one for name, one in state.items()}
        record = {"config": json.dumps({"transformer": config | settings})}
        save_file({**full, **beside, registers: torch.zeros(2, 3)}, path, metadata=record)
        return path
    given = write_dialect(path, state, layout, dit_diffusers_state)
    if "diffusers" in layout:
        inside = given if given.is_dir() else folder
        record = {"_class_name": "LTX2VideoTransformer3DModel", "rope_type": "split", **config, **settings}
        (inside / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return given
