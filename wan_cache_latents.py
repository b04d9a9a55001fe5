"""Encode the images and clips of a dataset with Wan2.1's VAE, for training.

All options: python wan_cache_latents.py --help
"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import read_latent_caching
from families import identify
from modules.command import as_typed, command_line
from modules.option_values import require
from wan.options import WanLatentCachingOptions


def main(argv: Sequence[str] | None = None, run: Callable[..., None] | None = None) -> None:
    """Cache. run: called with what would be cached, in place of it (cache_on_ray.py)."""
    options, debug, wan_options = read_latent_caching(__doc__, WanLatentCachingOptions, argv)
    if debug.debug_mode is None and not options.check:
        require(
            wan_options.vae.vae,
            "--vae",
            "it encodes the clips; only --debug_mode and --check work without it",
        )
    config = load_dataset_config(options.dataset_config)

    from dataset.commands import run_latent_caching  # torch loads here, after every option has been read
    from wan.family import family_for_latent_caching

    words = ["python", "wan_cache_text_encoder_outputs.py", "--t5", "T5"]
    following = as_typed([*words, "--dataset_config", str(options.dataset_config)])
    (run or run_latent_caching)(family_for_latent_caching(wan_options), config, options, debug, following)


if __name__ == "__main__":
    command_line(main, explain=identify)
