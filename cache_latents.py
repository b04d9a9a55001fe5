"""Encode the images and clips of a dataset with the VAE of HunyuanVideo or SkyReels V1, for training.

All options: python cache_latents.py --help
"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import read_latent_caching
from families import identify
from hunyuan_model.options import HunyuanLatentCachingOptions
from modules.command import as_typed, command_line
from modules.option_values import require


def main(argv: Sequence[str] | None = None, run: Callable[..., None] | None = None) -> None:
    """Cache. run: called with what would be cached, in place of it (cache_on_ray.py)."""
    options, debug, hunyuan_options = read_latent_caching(__doc__, HunyuanLatentCachingOptions, argv)
    if debug.debug_mode is None and not options.check:
        require(
            hunyuan_options.vae.file.vae,
            "--vae",
            "it encodes the clips; only --debug_mode and --check work without it",
        )
    config = load_dataset_config(options.dataset_config)

    from dataset.commands import run_latent_caching  # torch loads here, after every option has been read
    from hunyuan_model.family import family_for_latent_caching

    encoders = [word for n in "12" for word in (f"--text_encoder{n}", f"TEXT_ENCODER{n}")]
    words = ["python", "cache_text_encoder_outputs.py", *encoders]
    following = as_typed([*words, "--dataset_config", str(options.dataset_config)])
    (run or run_latent_caching)(family_for_latent_caching(hunyuan_options), config, options, debug, following)


if __name__ == "__main__":
    command_line(main, explain=identify)
