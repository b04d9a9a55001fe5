"""A whole tiny LTX-2 on disk, as it is released: one file of all parts, and Gemma's folder."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
}


def dit_config(version: str, **changes: Any) -> LtxConfig:
    """Dimensions of the transformer of the tiny release."""
    video, sound = SIZES[version]
    sizes = {"video": video, "sound": sound, "num_heads": 2, "cross_dim": sound.dim}
    return replace(tiny_dit.DIT_CONFIGS[version], **sizes, **changes)


@dataclass(frozen=True)
class TinyRelease:
    """Paths of a release, and diffusers' networks with its weights."""

    checkpoint: Path
    gemma: Path
    networks: dict[str, Any] = field(repr=False)

    @property
    def words(self) -> list[str]:
        """Options that every script takes."""
        return ["--ltx2_checkpoint", str(self.checkpoint), "--ltx_version", self.networks["version"]]


def write_release(folder: Path, version: str = "2.3", **changes: Any) -> TinyRelease:
    """Write a release into a folder. changes: of the transformer's dimensions."""
    folder.mkdir(parents=True, exist_ok=True)
    gemma = tiny_text.text_write_gemma(folder / "gemma", gemma_network := tiny_text.text_gemma())
    config = dit_config(version, **changes)
    parts: dict[str, Any] = {
        "vae": tiny_media.video_vae(version),
        "audio_vae": tiny_media.sound_vae(),
        "vocoder": tiny_media.vocoder(version),
        "connectors": tiny_text.text_connectors(version),
    }
    state = draw_state(lambda: LtxModel(config), seed=3)
    tensors: dict[str, Tensor] = {f"model.diffusion_model.{name}": one for name, one in state.items()}
    tensors |= tiny_media.video_vae_official(parts["vae"].state_dict())
    tensors |= tiny_media.sound_vae_official(parts["audio_vae"].state_dict())
    tensors |= tiny_media.vocoder_official(parts["vocoder"].state_dict())
    tensors |= tiny_text.text_official_names(parts["connectors"].state_dict())
    heads = {"num_attention_heads": config.num_heads, "av_ca_timestep_scale_multiplier": 1000}
    path = folder / "ltx 2.3.safetensors"
    record = tiny_text.official_record(parts["connectors"], **heads)
    save_file({name: one.contiguous() for name, one in tensors.items()}, path, record)
    return TinyRelease(
        path, gemma, {"version": version, "state": state, "text_encoder": gemma_network, **parts}
    )
