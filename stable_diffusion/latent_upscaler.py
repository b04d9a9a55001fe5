"""Upscale the first stage's images with a network on latents, like sd-scripts' tools.latent_upscaler.

For --highres_fix_upscaler tools.latent_upscaler --highres_fix_upscaler_args weights=FILE. Images are
enlarged by Lanczos and encoded; the network then adds what is lost. It is for latents of Stable Diffusion 1.x
and 2.x. Source of the structure: sd-scripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError, OptionError
from modules.paths import explain_missing

ARGS = "--highres_fix_upscaler_args"
WIDTH = 128
NUM_BLOCKS = 20
BLOCKS_PER_GROUP = 4  # each group adds its input to its output
LATENT_SCALE = 0.18215  # factor from the autoencoder's latents to those of Stable Diffusion 1.x and 2.x


class LatentRefinerBlock(nn.Module):
    """Residual block of two normalized convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output features, B width h w."""
        # x: B width h w
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(inner)))


class LatentRefiner(nn.Module):
    """Add the detail that enlarged latents lack; layer names match the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        for number in range(1, NUM_BLOCKS + 1):
            self.add_module(f"resblock{number}", LatentRefinerBlock(WIDTH))
        self.conv2 = nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH // 2)
        self.conv3 = nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(WIDTH // 2)
        self.conv_final = nn.Conv2d(WIDTH // 2, 4, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Add the predicted detail to latents, B 4 h w."""
        x = torch.relu(self.bn1(self.conv1(latents)))
        for first in range(1, NUM_BLOCKS + 1, BLOCKS_PER_GROUP):
            group = x
            for number in range(first, first + BLOCKS_PER_GROUP):
                group = self.get_submodule(f"resblock{number}")(group)
            x = x + group
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return latents + self.conv_final(x)


@dataclass(frozen=True)
class LatentUpscaler:
    """Resize images and encode them to latents of the requested size; a network adds detail to these."""

    refiner: LatentRefiner

    @torch.no_grad()
    def upscale(
        self,
        vae: Any,
        imgs: Sequence[Image.Image],
        latents: None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int,
        vae_batch_size: int,
    ) -> Tensor:
        """Enlarge images, encode them with the VAE and refine the latents; return these, B 4 h w.

        Uses the mean of the VAE's posterior, so the result is deterministic.
        """
        del latents, dtype  # arguments that only other upscalers use
        scale = getattr(vae.config, "scaling_factor", LATENT_SCALE)
        if abs(scale - LATENT_SCALE) > 1e-4:
            raise OptionError(
                "--highres_fix_upscaler tools.latent_upscaler is for latents of Stable Diffusion 1.x and "
                "2.x, but this model has different ones. Pass stable_diffusion.model_upscaler with "
                "model=FILE, a SwinIR or ESRGAN file"
            )
        vae_weight = next(vae.parameters())
        enlarged = [image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for image in imgs]
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in enlarged]).movedim(-1, 1)
        pixels = pixels.float() / 127.5 - 1
        encoded = [
            vae.encode(batch.to(vae_weight.device, vae_weight.dtype)).latent_dist.mean.float()
            for batch in pixels.split(vae_batch_size)
        ]
        refiner = self.refiner.to(vae_weight.device)  # float32, because it is small
        refined = [refiner(batch) for batch in torch.cat(encoded).split(batch_size)]
        return torch.cat(refined) * LATENT_SCALE


def create_upscaler(**args: str) -> LatentUpscaler:
    """Return the latent upscaler with the network in the file `weights`.

    Raises OptionError for other settings, or CheckpointError for a file with a different network.
    """
    unknown = sorted(args.keys() - {"weights"})
    if unknown or "weights" not in args:
        problem = f"{unknown[0]} is not known; " if unknown else ""
        raise OptionError(f"{ARGS}: {problem}give weights=FILE, a latent upscaler of sd-scripts")
    path = Path(args["weights"])
    if not path.exists():
        hint = explain_missing(path)
        raise OptionError(f"{ARGS} weights={path}: no such file.{hint} Pass a latent upscaler of sd-scripts")
    refiner = LatentRefiner()
    # Read the weights of a latent upscaler; raise CheckpointError for a file of another network
    state = {}
    with open_checkpoint(path) as checkpoint:
        for name, tensor in refiner.state_dict().items():
            info = checkpoint.tensors.get(name)
            # counts of batches, which only a training run needs, are not in every file
            is_count = name.endswith("num_batches_tracked")
            if is_count and info is None:
                continue
            if not is_count and (info is None or info.shape != tensor.shape):
                raise CheckpointError(
                    f"{path} is not a latent upscaler of sd-scripts. Pass such a file to weights=, or a "
                    "SwinIR or ESRGAN file to --highres_fix_upscaler stable_diffusion.model_upscaler with "
                    "model=FILE",
                    path,
                )
            state[name] = checkpoint.read(name)
    refiner.load_state_dict(state, strict=False)
    return LatentUpscaler(refiner.eval())
