"""A complete tiny Kandinsky 6 on disk: the folder of a release for diffusers, or the maker's names."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import MMAudioVAE, MMAudioVocoder
from safetensors.torch import save_file
from torch import Tensor

from kandinsky.configs import Kandinsky6Config, KandinskyStream
from kandinsky.model_6 import Kandinsky6Model
from tests.tiny.dit_files import draw_state, write_dialect
from tests.tiny.hunyuan_encoders import CLIP_DIM
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.kandinsky import TinyKandinsky, write_clip, write_qwen
from tests.tiny.language_models import DIM

CONFIG = Kandinsky6Config(
    video=KandinskyStream(dim=64, ffn_dim=144, head_width=32, time_dim=48),
    audio=KandinskyStream(dim=32, ffn_dim=80, head_width=32, time_dim=40),
    num_layers=2,
    text_layers=2,
    in_channels=33,
    out_channels=16,
    audio_channels=40,
    text_dim=DIM,
    pooled_dim=CLIP_DIM,
    num_token_types=2,
)
SCALE = 0.5302
# our names -> diffusers'
TO_DIFFUSERS = (
    (r"^visual_blocks\.", "visual_transformer_blocks."),
    (r"^audio_outLayer\.", "audio_out_layer."),
    (r"\.(video|audio)T\.", r".\1_dec_block."),
    (r"feed_forward\.in_layer", "feed_forward.net.0.proj"),
    (r"feed_forward\.out_layer", "feed_forward.net.2"),
    (r"(time_embeddings)\.in_layer", r"\1.timestep_embedder.linear_1"),
    (r"(time_embeddings)\.out_layer", r"\1.timestep_embedder.linear_2"),
    (r"(text_transformer_blocks\.\d+)\.self_attention", r"\1.attn"),
)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of diffusers."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Tensor]:
    """Random weights under our names, the maker's. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)
    return draw_state(lambda: Kandinsky6Model(config), seed, dtype)


@dataclass(frozen=True)
class TinyKandinsky6(TinyKandinsky):
    """Paths of a tiny checkpoint set, with those of the sound."""

    audio_vae: Path
    vocoder: Path

    @property
    def sound(self) -> list[str]:
        """The options that name the networks of the sound."""
        return ["--audio_vae", str(self.audio_vae), "--vocoder", str(self.vocoder)]


def make_audio_vae(seed: int = 3, scale: float = SCALE) -> MMAudioVAE:
    """diffusers' MMAudio VAE with few channels and random weights."""
    torch.manual_seed(seed)
    vae = MMAudioVAE(
        mel_bins=16, hidden_channels=8, channel_multipliers=(1, 2), layers_per_block=1, scaling_factor=scale
    )
    for name, parameter in vae.named_parameters():
        # the convolutions keep a signal at its size, as the released ones do
        torch.nn.init.normal_(parameter, std=0.1 if "gain" in name else parameter[0].numel() ** -0.5)
    vae.vae.data_mean.normal_(-4)
    vae.vae.data_std.uniform_(1, 2)
    return vae.eval()


def make_vocoder(seed: int = 4) -> MMAudioVocoder:
    """diffusers' BigVGAN with few channels and random weights, which lengthens by 512 too."""
    torch.manual_seed(seed)
    vocoder = MMAudioVocoder(
        num_mels=16,
        upsample_initial_channel=16,
        upsample_rates=(8, 8, 8),
        upsample_kernel_sizes=(16, 16, 16),
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3, 5), (1, 3, 5)),
    )
    for parameter in vocoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vocoder.eval()


def write_sound(folder: Path, scale: float = SCALE) -> tuple[Path, Path]:
    """Write audio_vae and vocoder of a release into a folder. Returns their folders."""
    folders = []
    for name, network in (("audio_vae", make_audio_vae(scale=scale)), ("vocoder", make_vocoder())):
        network.save_pretrained(folder / name)
        folders.append(folder / name)
    return folders[0], folders[1]


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "kandinsky6lite"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, to_diffusers)


def write_tiny_kandinsky_6(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: Any
) -> TinyKandinsky6:
    """Write transformer, VAEs, text encoders with their tokenizers and vocoder below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    audio_vae, vocoder = write_sound(folder)
    return TinyKandinsky6(
        write_dit(folder, tiny_state(dtype=dtype, **sizes), name=name),
        write_vae(folder / "vae.safetensors"),
        write_qwen(folder / "text_encoder"),
        write_clip(folder / "text_encoder_2"),
        audio_vae,
        vocoder,
    )


def write_release(folder: Path) -> Path:
    """Write the transformer as a release for diffusers has it. Returns its folder `transformer`."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    save_file(to_diffusers(tiny_state()), transformer / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "Kandinsky6Transformer3DModel"}
    (transformer / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return transformer
