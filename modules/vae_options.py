"""Options of the VAE that all families share. Standard library only."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import show_number
from modules.options import Options, option

VAE_TILE = 256  # pixels, as --vae_tiling in the known tuners
LEAST_TILE, MOST_TILE, TILE_STEP = 32, 16384, 16
AE_HELP = "FLUX's autoencoder (also --vae)"
# settings of `VaeOptions` where FLUX's autoencoder is the VAE
AE: Mapping[str, Any] = {"vae": {"flags": ("--ae",)}}


class VaeOptions(Options):
    """File of the VAE, its compute dtype, and the size of tiles."""

    vae: Path | None = option("VAE checkpoint", often=True)
    vae_dtype: str | None = option("dtype of the VAE")
    vae_spatial_tile_sample_min_size: int | None = option("edge of a tile in pixels; implies tiling")
    vae_tiling: bool = option(f"encode and decode in tiles of {VAE_TILE} pixels: less memory")

    def __post_init__(self) -> None:
        size = self.vae_spatial_tile_sample_min_size
        if size is not None and (not LEAST_TILE <= size <= MOST_TILE or size % TILE_STEP):
            raise OptionError(
                f"--vae_spatial_tile_sample_min_size {show_number(size)}: give a multiple of {TILE_STEP}, at "
                f"least {LEAST_TILE} and at most {MOST_TILE}"
            )

    @property
    def tile(self) -> int | None:
        """Return the edge of a tile in pixels, None for no tiling. A size implies tiling."""
        if self.vae_spatial_tile_sample_min_size is not None:
            return self.vae_spatial_tile_sample_min_size
        return VAE_TILE if self.vae_tiling else None


def take_ae(args: argparse.Namespace) -> None:
    """Put --ae into --vae. Raises OptionError if both are given and differ."""
    if args.ae is not None and args.vae not in (None, args.ae):
        raise OptionError(f"--ae {args.ae} and --vae {args.vae} name two autoencoders: give one of them")
    args.vae = args.ae if args.vae is None else args.vae
