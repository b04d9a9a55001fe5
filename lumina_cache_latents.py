"""Encode the pictures of a dataset with the autoencoder of Lumina-Image-2.0 (FLUX's), for training.

All options: python lumina_cache_latents.py --help
"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import read_latent_caching
from families import identify
from lumina.options import LuminaLatentCachingOptions
from modules.command import as_typed, command_line
from modules.option_values import require


def main(argv: Sequence[str] | None = None, run: Callable[..., None] | None = None) -> None:
    """Cache. run: called with what would be cached, in place of it (cache_on_ray.py)."""
    options, debug, lumina_options = read_latent_caching(__doc__, LuminaLatentCachingOptions, argv)
    if debug.debug_mode is None and not options.check:
        require(
            lumina_options.vae.vae,
            "--ae",
            "it encodes the pictures; only --debug_mode and --check work without it",
        )
    config = load_dataset_config(options.dataset_config)

    from dataset.commands import run_latent_caching  # torch loads here, after every option has been read
    from lumina.family import family_for_latent_caching

    words = ["python", "lumina_cache_text_encoder_outputs.py", "--gemma2", "GEMMA2"]
    following = as_typed([*words, "--dataset_config", str(options.dataset_config)])
    (run or run_latent_caching)(family_for_latent_caching(lumina_options), config, options, debug, following)


if __name__ == "__main__":
    command_line(main, explain=identify)
