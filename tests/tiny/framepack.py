"""A complete tiny FramePack on disk, in the released file layouts.

FramePack-F1 is the same but for its weights.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny.framepack_dit import tiny_state, write_dit
from tests.tiny.framepack_encoders import SIGLIP_DIM, siglip_tensors
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM, prefixed, save, write_text_encoders
from tests.tiny.hunyuan_vae import write_vae


@dataclass(frozen=True)
class TinyFramePack:
    """Paths of a tiny checkpoint set, as given to --dit, --vae, --text_encoder1, --text_encoder2,
    --image_encoder.
    """

    dit: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path
    image_encoder: Path

    @property
    def encoders(self) -> list[str]:
        """The options that name VAE, text encoders and image encoder, all in float32."""
        texts = ["--text_encoder1", str(self.text_encoder1), "--text_encoder2", str(self.text_encoder2)]
        return [
            *("--vae", str(self.vae), "--vae_dtype", "float32"),
            *texts,
            *("--image_encoder", str(self.image_encoder)),
        ]

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        return ["--dit", str(self.dit), *self.encoders]


def write_tiny_framepack(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> TinyFramePack:
    """Write transformer, VAE, text encoders with tokenizers and image encoder below `folder`.

    sizes: of the transformer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = tiny_state(dtype=dtype, text_dim=LLM_DIM, pooled_dim=CLIP_DIM, image_dim=SIGLIP_DIM, **sizes)
    texts = write_text_encoders(folder)
    return TinyFramePack(
        write_dit(folder, state, name="dit"),
        write_vae(folder / "vae.safetensors"),
        **texts,
        image_encoder=write_siglip(folder / "siglip.safetensors"),
    )


def write_siglip(path: Path) -> Path:
    """A tiny image encoder."""
    return save(path, prefixed(siglip_tensors(), "vision_model."))


def lay_out_models(folder: Path) -> None:
    """Transformers and image encoder under the names that the documents use; the other encoders are
    HunyuanVideo's.
    """
    state = tiny_state(
        dtype=torch.bfloat16, text_dim=LLM_DIM, pooled_dim=CLIP_DIM, image_dim=SIGLIP_DIM, single_blocks=5
    )
    write_dit(folder, state, name="FramePackI2V_HY_bf16")
    write_dit(folder / "FramePack_F1_I2V_HY_20250503", state, name="diffusion_pytorch_model")
    write_siglip(folder / "sigclip_vision_patch14_384.safetensors")
