"""Options of the VAE that all families share. Standard library only."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import show_number

VAE_TILE = 256  # pixels, as --vae_tiling in the known tuners
LEAST_TILE, MOST_TILE, TILE_STEP = 32, 16384, 16


@dataclass(frozen=True)
class VaeOptions:
    """Where the VAE is, what it computes in, and how large the tiles are."""

    vae: Path | None
    vae_dtype: str | None
    vae_tiling: bool
    vae_spatial_tile_sample_min_size: int | None

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


def add_vae_arguments(
    group: argparse._ArgumentGroup,
    *,
    always_tiled: bool = False,
    flags: Sequence[str] = ("--vae",),
    tile: int = VAE_TILE,
) -> None:
    """Add the arguments of `VaeOptions`. always_tiled: --vae_tiling is on, given or not.

    flags: of the file; none if the parser has a --vae already. tile: edge of the tiles if no option says it.
    """
    if flags:
        group.add_argument(*flags, dest="vae", type=str, default=None, help="VAE checkpoint")
    group.add_argument("--vae_dtype", type=str, default=None, help="dtype of the VAE")
    text = (
        f"edge of a tile in pixels, default {tile}"
        if always_tiled
        else "edge of a tile in pixels; implies tiling"
    )
    group.add_argument("--vae_spatial_tile_sample_min_size", type=int, default=None, help=text)
    does = f"encode and decode in tiles of {tile} pixels: less memory"
    group.add_argument(
        "--vae_tiling",
        action="store_true",
        default=always_tiled,
        help=f"{does}; always on here" if always_tiled else does,
    )


def add_ae_argument(group: argparse._ArgumentGroup) -> None:
    """Declare --ae in a parser that has --vae; `take_ae` puts what it says there."""
    group.add_argument("--ae", type=str, default=None, help="FLUX's autoencoder (also --vae)")


def take_ae(args: argparse.Namespace) -> None:
    """Put --ae into --vae. Raises OptionError if both are given and differ."""
    if args.ae is not None and args.vae not in (None, args.ae):
        raise OptionError(f"--ae {args.ae} and --vae {args.vae} name two autoencoders: give one of them")
    args.vae = args.ae if args.vae is None else args.vae
