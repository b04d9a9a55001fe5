"""Encode the clips or pictures of a dataset with FramePack's VAE and image encoder, for training.

All options: python fpack_cache_latents.py --help
"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import read_latent_caching
from families import identify
from frame_pack.options import FramePackLatentCachingOptions
from modules.command import as_typed, command_line
from modules.option_values import require


def main(argv: Sequence[str] | None = None, run: Callable[..., None] | None = None) -> None:
    """Cache. run: called with what would be cached, in place of it (cache_on_ray.py)."""
    options, debug, fpack_options = read_latent_caching(__doc__, FramePackLatentCachingOptions, argv)
    if debug.debug_mode is None and not options.check:
        require(
            fpack_options.vae.file.vae,
            "--vae",
            "it encodes the clips; only --debug_mode and --check work without it",
        )
        require(
            fpack_options.image_encoder,
            "--image_encoder",
            "it encodes first frames; only --debug_mode and --check work without it",
        )
    config = load_dataset_config(options.dataset_config)

    from dataset.commands import run_latent_caching  # torch loads here, after every option has been read
    from frame_pack.family import family_for_latent_caching

    encoders = [word for n in "12" for word in (f"--text_encoder{n}", f"TEXT_ENCODER{n}")]
    words = ["python", "fpack_cache_text_encoder_outputs.py", *encoders]
    following = as_typed([*words, "--dataset_config", str(options.dataset_config)])
    (run or run_latent_caching)(family_for_latent_caching(fpack_options), config, options, debug, following)


if __name__ == "__main__":
    command_line(main, explain=identify)
