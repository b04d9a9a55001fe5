"""Encode the pictures of a dataset with the VAE of HunyuanImage-2.1, for training.

All options: python hunyuan_image_cache_latents.py --help
"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import read_latent_caching
from families import identify
from hunyuan_image.options import HunyuanImageLatentCachingOptions
from modules.command import as_typed, command_line
from modules.option_values import require


def main(argv: Sequence[str] | None = None, run: Callable[..., None] | None = None) -> None:
    """Cache. run: called with what would be cached, in place of it (cache_on_ray.py)."""
    options, debug, own_options = read_latent_caching(__doc__, HunyuanImageLatentCachingOptions, argv)
    if debug.debug_mode is None and not options.check:
        require(
            own_options.vae.file.vae,
            "--vae",
            "it encodes the pictures; only --debug_mode and --check work without it",
        )
    config = load_dataset_config(options.dataset_config)

    from dataset.commands import run_latent_caching  # torch loads here, after every option has been read
    from hunyuan_image.family import family_for_latent_caching

    encoders = ["--text_encoder", "QWEN_FILE", "--byt5", "BYT5_FILE"]
    words = ["python", "hunyuan_image_cache_text_encoder_outputs.py", *encoders]
    following = as_typed([*words, "--dataset_config", str(options.dataset_config)])
    (run or run_latent_caching)(family_for_latent_caching(own_options), config, options, debug, following)


if __name__ == "__main__":
    command_line(main, explain=identify)
