"""HunyuanVideo's VAE and text encoders in a diffusers pipeline, for prepare_dataset.py."""

from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.files import HunyuanEncoderPaths, beside
from hunyuan_model.spec import LATENT
from hunyuan_model.text_encoders import LlavaTextEncoder, clip_text_encoder, template_of
from hunyuan_model.vae import TILE, load_vae
from modules.contract.family import EncodeMoments, MakerSettings, MomentsMaker, causal_frames
from modules.errors import OptionError


def make_maker(folder: Path, settings: MakerSettings) -> MomentsMaker:
    """Describe the networks in a pipeline's folder; headers are read, nothing is loaded.

    Raises OptionError for a number of tokens, CheckpointError if a part is missing or another model's.
    """
    if settings.max_tokens is not None:
        raise OptionError(
            f"--max_sequence_length {settings.max_tokens}: the text encoders of HunyuanVideo read 256 and 77 "
            "tokens, which its transformer expects. Leave the option out."
        )
    tokenizers = (folder / "tokenizer", folder / "tokenizer_2")
    first, second = (path if path.exists() else None for path in tokenizers)
    files = HunyuanEncoderPaths(
        vae=folder / "vae",
        text_encoder1=folder / "text_encoder",
        text_encoder2=folder / "text_encoder_2",
        text_encoder1_tokenizer=first,
        text_encoder2_tokenizer=second,
        vae_dtype=settings.dtype,
        vae_tile=TILE if settings.tiled else None,
    )
    files.check()

    def load(device: torch.device) -> EncodeMoments:
        vae = load_vae(files.vae_path, device, settings.dtype, tile=files.vae_tile)

        def encode(pixels: Tensor) -> Tensor:
            return vae.moments(pixels)

        return encode

    dtype = beside(None, None)  # that caching has by default: so its caches take these embeddings
    return MomentsMaker(
        architecture="hunyuan_video",
        latent=LATENT,
        identity=files.vae_identity(None),
        usable_frames=causal_frames,
        load=load,
        text_encoders=(
            LlavaTextEncoder(files.text_encoder1_path, dtype, first, template_of(None)),
            clip_text_encoder(files.text_encoder2_path, dtype, second),
        ),
    )
