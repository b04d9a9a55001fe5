"""A complete tiny FramePack on disk in the released layouts, its SigLIP in every layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from encoders.siglip import SiglipConfig, SiglipVision
from tests.tiny.framepack_dit import tiny_state, write_dit
from tests.tiny.hunyuan import TinyHunyuan
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM, prefixed, save, write_text_encoders
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.wan_encoders import random_tensors


@dataclass(frozen=True)
class TinyFramePack(TinyHunyuan):
    """Paths of a tiny checkpoint set: those of HunyuanVideo, and that for --image_encoder."""

    image_encoder: Path

    @property
    def encoders(self) -> list[str]:
        return [*super().encoders, "--image_encoder", str(self.image_encoder)]


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


SIGLIP_DIM = 144  # width of the image features


def siglip_config(heads: int = 2, image_size: int = 384, patch_size: int = 14) -> SiglipConfig:
    return SiglipConfig(SIGLIP_DIM, 200, heads, num_layers=2, image_size=image_size, patch_size=patch_size)


def siglip_tensors(
    seed: int = 5, dtype: torch.dtype = torch.float32, config: SiglipConfig | None = None
) -> dict[str, Tensor]:
    """An image tower with the names of the bare module, without its pooling."""
    with torch.device("meta"):
        network = SiglipVision(config or siglip_config())
    return {name: tensor.to(dtype) for name, tensor in random_tensors(network, seed).items()}


def siglip_layouts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The image tower as the published files name it."""
    one = torch.ones(2)
    head = {
        "head.probe": torch.ones(1, 1, SIGLIP_DIM),
        "head.attention.in_proj_weight": one,
        "head.mlp.fc1.weight": one,
    }
    plain = prefixed({**tensors, **head}, "vision_model.")
    return {
        "vision": plain,
        "without prefix": {**tensors, **head},  # as transformers 5 save it
        "without pooling": prefixed(tensors, "vision_model."),
        "old": {**plain, "vision_model.embeddings.position_ids": torch.arange(729)[None]},
        "both towers": {
            **plain,
            "text_model.embeddings.token_embedding.weight": one,
            "text_model.encoder.layers.0.self_attn.q_proj.weight": one,
            "logit_scale": torch.tensor(2.0),
            "logit_bias": torch.tensor(-2.0),
        },
    }
