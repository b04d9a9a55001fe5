"""Decode latents of sound to tracks, before the pictures: the networks are freed before the VAE comes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from modules.bars import track
from modules.checkpoints.finite import is_finite
from modules.contract.family import HearsSound
from modules.devices import free_memory
from modules.errors import UserError
from modules.media.tracks import Track


@torch.no_grad()
def decode_tracks(
    family: HearsSound,
    latents: Mapping[str, Tensor],
    device: torch.device,
    note: Callable[[str], AbstractContextManager[object]],
) -> dict[str, Track]:
    """Return the track of each clip, by its label, without those that fail.

    latents: 1 C T M in model space, by label. note: label -> a block that notes an error of the clip.
    """
    made: dict[str, Track] = {}
    if not latents:
        return made
    networks = family.sound_networks(device, decodes=True)
    try:
        for label in track(latents, "Decoding sound", len(latents), unit="clip"):
            with note(label):
                sound = family.decode_sound(networks, latents[label].to(device))
                if not is_finite(sound.samples):
                    raise UserError(
                        "The sound's decoder made values that are NaN or infinite of good latents: nothing "
                        "would be heard. Give --vae_dtype float32"
                    )
                made[label] = sound.samples.float().cpu().numpy(), sound.rate
    finally:
        del networks
        free_memory(device)
    return made
