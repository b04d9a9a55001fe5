"""Wan's VAE and text encoder in a diffusers pipeline, for prepare_dataset.py."""

from pathlib import Path

import torch
from torch import Tensor

from modules.checkpoints.opening import fingerprint
from modules.contract.family import EncodeMoments, MakerSettings, MomentsMaker, causal_frames
from modules.devices import dtype_name
from modules.errors import OptionError
from wan.configs import WAN_2_2
from wan.files import WanFiles
from wan.spec import LATENT, LATENT_5B
from wan.t5 import WanTextEncoder
from wan.vae import load_vae

TILE = 256  # pixels


def make_maker(folder: Path, settings: MakerSettings) -> MomentsMaker:
    """Describe the networks in a pipeline's folder; headers are read, nothing is loaded.

    Raises OptionError for a number of tokens, CheckpointError if a part is missing or another model's.
    """
    if settings.max_tokens is not None:
        raise OptionError(
            f"--max_sequence_length {settings.max_tokens}: the text encoder of Wan reads 512 tokens and "
            "returns as many rows as a caption has. Leave the option out."
        )
    tokenizer = folder / "tokenizer"
    files = WanFiles(
        vae=folder / "vae",
        t5=folder / "text_encoder",
        t5_tokenizer=tokenizer if tokenizer.exists() else None,
    )
    files.check_encoders("vae", "t5")
    files.check_tokenizer()
    tile = TILE if settings.tiled else None

    def load(device: torch.device) -> EncodeMoments:
        vae = load_vae(files.vae_path, device, settings.dtype, tile=tile)

        def encode(pixels: Tensor) -> Tensor:
            return vae.moments(pixels)

        return encode

    return MomentsMaker(
        architecture="wan",
        latent=LATENT_5B if files.vae_release() is WAN_2_2 else LATENT,
        identity={
            "vae": fingerprint(files.vae_path),
            "vae_dtype": dtype_name(settings.dtype),
            "tile": str(tile),
        },
        usable_frames=causal_frames,
        load=load,
        text_encoders=(WanTextEncoder(files.t5_path, files.t5_tokenizer),),
    )
