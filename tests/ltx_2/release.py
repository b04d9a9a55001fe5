"""A whole tiny LTX-2 on disk: one file of all parts, and Gemma's folder; what two stages need."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from safetensors.torch import save_file
from torch import Tensor

from ltx_2.configs import LtxConfig, StreamConfig
from ltx_2.model import LtxModel
from tests.ltx_2 import tiny_dit, tiny_media, tiny_text
from tests.tiny.dit_files import draw_state

# widths follow from the connectors of `tiny_text`; channels from the autoencoders of `tiny_media`
SIZES = {
    "2.0": (StreamConfig(48, 192, 16, 32), StreamConfig(32, 128, 16, 32)),
    "2.3": (StreamConfig(24, 96, 16, 24), StreamConfig(16, 64, 16, 16)),
    "2.5": (StreamConfig(24, 96, 16, 24, ff_bias=False), StreamConfig(16, 64, 16, 16)),
}
MARKER = "keyframes_abs_pos_embedding"
RANK = 4
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"use_rational_resampler": False},
    "rational": {},
    "three halves": {"rational_spatial_scale": 1.5},
    "four times": {"rational_spatial_scale": 4.0},
    "in two dimensions": {"dims": 2},
    "frames": {"spatial_upsample": False, "temporal_upsample": True},
    "both": {"temporal_upsample": True},
}


def dit_config(version: str, **changes: Any) -> LtxConfig:
    """Dimensions of the transformer of the tiny release."""
    video, audio = SIZES[version]
    sizes = {"video": video, "audio": audio, "num_heads": 2, "cross_dim": audio.dim}
    return replace(tiny_dit.DIT_CONFIGS[version], **sizes, **changes)


@dataclass(frozen=True)
class TinyRelease:
    """Paths of a release, and diffusers' networks with its weights."""

    checkpoint: Path
    gemma: Path  # of 2.5: the file with projections and tokenizer
    networks: dict[str, Any] = field(repr=False)

    @property
    def words(self) -> list[str]:
        """Options that every script takes."""
        return ["--ltx2_checkpoint", str(self.checkpoint), "--ltx_version", self.networks["version"]]

    @property
    def texts(self) -> list[str]:
        """Options of scripts that encode texts."""
        is_one = self.gemma.is_file()
        return ["--ltx2_text_encoder_checkpoint" if is_one else "--gemma_root", str(self.gemma)]

    @property
    def vaes(self) -> list[str]:
        """Options of scripts that encode or decode media."""
        folder = self.checkpoint.parent
        is_apart = self.networks["version"] == "2.5"
        files = {"--ltx2_video_vae": "video vae", "--ltx2_audio_vae": "audio vae"} if is_apart else {}
        return [word for flag, name in files.items() for word in (flag, str(folder / f"{name}.safetensors"))]


def write_release(folder: Path, version: str = "2.3", **changes: Any) -> TinyRelease:
    """Write a release into a folder. changes: of the transformer's dimensions."""
    folder.mkdir(parents=True, exist_ok=True)
    config, is_apart = dit_config(version, **changes), version == "2.5"
    parts: dict[str, Any] = {
        "vae": tiny_media.video_vae("2.3" if is_apart else version),
        "audio_vae": tiny_media.audio_vae(),
        "vocoder": tiny_media.vocoder(version),
        "connectors": tiny_text.text_connectors(version),
    }
    state = draw_state(lambda: LtxModel(config), seed=3)
    if is_apart:
        state[MARKER] = 4 * state[MARKER]  # so that latents tell whether it is there
        gemma_network = tiny_text.text_gemma_4()
        gemma = tiny_text.text_write_gemma_4(folder / "text.safetensors", gemma_network, parts["connectors"])
    else:
        gemma = tiny_text.text_write_gemma(folder / "gemma", gemma_network := tiny_text.text_gemma())
    tensors: dict[str, Tensor] = {f"model.diffusion_model.{name}": one for name, one in state.items()}
    tensors |= tiny_media.video_vae_official(parts["vae"].state_dict())
    tensors |= tiny_media.audio_vae_official(parts["audio_vae"].state_dict())
    tensors |= tiny_media.vocoder_official(parts["vocoder"].state_dict())
    tensors |= tiny_text.text_official_names(parts["connectors"].state_dict())
    heads = {"num_attention_heads": config.num_heads, "av_ca_timestep_scale_multiplier": 1000}
    path = folder / "ltx 2.3.safetensors"
    record = tiny_text.official_record(parts["connectors"], **heads)
    files = {path: ("",)}
    if is_apart:
        named = {"gemma_version": tiny_text.GEMMA_VERSION, "ltx_version": "2.5.0"}
        record |= {"model_version": "2.5.0", "gemma_source_checkpoint": json.dumps(named)}
        files = {
            path: ("model.diffusion_model.",),
            folder / "video vae.safetensors": ("vae.",),
            folder / "audio vae.safetensors": ("audio_vae.", "vocoder."),
        }
    for file, starts in files.items():
        own = {name: one.contiguous() for name, one in tensors.items() if name.startswith(starts)}
        save_file(own, file, record)
    return TinyRelease(
        path, gemma, {"version": version, "state": state, "text_encoder": gemma_network, **parts}
    )


def upscaler(kind: str) -> LTX2LatentUpsamplerModel:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        made = LTX2LatentUpsamplerModel(
            in_channels=16, mid_channels=32, num_blocks_per_stage=2, **KINDS[kind]
        )
        for parameter in made.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return made.eval().requires_grad_(False)


def write_upscaler(path: Path, kind: str) -> LTX2LatentUpsamplerModel:
    """Write an official file: diffusers' names, the settings in its metadata under the official names."""
    made = upscaler(kind)
    config = {"spatial_scale": made.config.rational_spatial_scale, "dims": made.config.dims}
    save_file({**made.state_dict()}, path, {"config": json.dumps(config)})
    return made


def write_lora(path: Path, **metadata: str) -> dict[str, Tensor]:
    """Write a LoRA as it is released, for attention of both streams; return what it adds to weights."""
    config, generator = dit_config("2.3"), torch.Generator().manual_seed(9)
    assert config.audio is not None
    tensors, added = {}, {}
    for block in range(config.num_layers):
        for name, width in (("attn1", config.video.dim), ("audio_attn1", config.audio.dim)):
            layer = f"transformer_blocks.{block}.{name}.to_out.0"
            shapes = (RANK, width), (width, RANK)
            down, up = (0.3 * torch.randn(shape, generator=generator) for shape in shapes)
            tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
            tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
            added[f"{layer}.weight"] = up @ down
    save_file(tensors, path, metadata)
    return added
