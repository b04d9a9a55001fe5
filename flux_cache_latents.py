"""Encode the pictures of a dataset with the autoencoder of FLUX.1 and Chroma, for training.

All options: python flux_cache_latents.py --help
"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import read_latent_caching
from families import identify
from flux.options import FluxLatentCachingOptions
from modules.command import as_typed, command_line
from modules.option_values import require


def main(argv: Sequence[str] | None = None, run: Callable[..., None] | None = None) -> None:
    """Cache. run: called with what would be cached, in place of it (cache_on_ray.py)."""
    options, debug, flux_options = read_latent_caching(__doc__, FluxLatentCachingOptions, argv)
    if debug.debug_mode is None and not options.check:
        require(
            flux_options.vae.vae,
            "--ae",
            "it encodes the pictures; only --debug_mode and --check do not need it",
        )
    config = load_dataset_config(options.dataset_config)

    from dataset.commands import run_latent_caching  # torch loads here, after every option has been read
    from flux.family import family_for_latent_caching

    encoders = ["--t5xxl", "T5_FILE", "--clip_l", "CLIP_FILE"]
    words = ["python", "flux_cache_text_encoder_outputs.py", *encoders]
    following = as_typed([*words, "--dataset_config", str(options.dataset_config)])
    (run or run_latent_caching)(family_for_latent_caching(flux_options), config, options, debug, following)


if __name__ == "__main__":
    command_line(main, explain=identify)
