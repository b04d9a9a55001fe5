"""A complete tiny HunyuanVideo or SkyReels V1 on disk, in the released file layouts."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny.hunyuan_dit import tiny_state, write_dit
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM, write_comfy_text_encoders, write_text_encoders
from tests.tiny.hunyuan_vae import write_vae


@dataclass(frozen=True)
class TinyHunyuan:
    """Paths of a tiny checkpoint set, as given to --dit, --vae, --text_encoder1, --text_encoder2."""

    dit: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path

    @property
    def encoders(self) -> list[str]:
        """The options that name VAE and text encoders, all in float32."""
        texts = ["--text_encoder1", str(self.text_encoder1), "--text_encoder2", str(self.text_encoder2)]
        return ["--vae", str(self.vae), "--vae_dtype", "float32", *texts]

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        return ["--dit", str(self.dit), *self.encoders]


def write_tiny_hunyuan(
    folder: Path, kind: str = "t2v", dtype: torch.dtype = torch.float32, **sizes: int
) -> TinyHunyuan:
    """Write transformer, VAE and both text encoders with tokenizers below `folder`.

    sizes: of the transformer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = tiny_state(kind, dtype=dtype, text_dim=LLM_DIM, pooled_dim=CLIP_DIM, **sizes)
    texts = write_text_encoders(folder)
    return TinyHunyuan(write_dit(folder, state, name="dit"), write_vae(folder / "vae.safetensors"), **texts)


def lay_out_models(folder: Path) -> None:
    """Tiny models under the names that the documents use."""
    state = tiny_state(dtype=torch.bfloat16, text_dim=LLM_DIM, pooled_dim=CLIP_DIM)
    image = tiny_state("i2v", dtype=torch.bfloat16, text_dim=LLM_DIM, pooled_dim=CLIP_DIM)
    release = folder / "hunyuan-video-t2v-720p"
    write_dit(release / "transformers", state, "pt", name="mp_rank_00_model_states")
    write_vae(release / "vae" / "pytorch_model.pt")
    write_dit(folder, state, name="skyreels_hunyuan_t2v_bf16")
    write_dit(folder, image, name="skyreels_hunyuan_i2v_bf16")
    write_comfy_text_encoders(folder)
    write_text_encoders(folder)  # the release's folders
