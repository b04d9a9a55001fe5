"""Options of image trainers that cache latents and texts inside the training command."""

import argparse
from dataclasses import dataclass

from modules.option_values import check_at_least


@dataclass(frozen=True)
class CachingInRunOptions:
    """What is cached before training, where, and how many at once. Without it our own caches are read."""

    cache_latents: bool
    cache_latents_to_disk: bool
    vae_batch_size: int
    skip_cache_check: bool  # files are taken as they are if they exist
    cache_text_encoder_outputs: bool
    cache_text_encoder_outputs_to_disk: bool
    text_encoder_batch_size: int | None  # None: that of the training

    def __post_init__(self) -> None:
        check_at_least("--vae_batch_size", self.vae_batch_size, 1, "pictures to encode at once")
        check_at_least(
            "--text_encoder_batch_size", self.text_encoder_batch_size, 1, "captions to encode at once"
        )

    @property
    def caches_latents(self) -> bool:
        """Return whether latents are cached; to disk includes it."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_texts(self) -> bool:
        """Return whether texts are cached; to disk includes it."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk


def add_caching_in_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `CachingInRunOptions`."""
    group = parser.add_argument_group("caches made by this command")
    group.add_argument(
        "--cache_latents", action="store_true", help="encode all pictures once, and keep their latents"
    )
    group.add_argument(
        "--cache_latents_to_disk", action="store_true", help="the same, in files beside the pictures"
    )
    group.add_argument("--vae_batch_size", type=int, default=1, help="pictures to encode at once")
    group.add_argument(
        "--skip_cache_check", action="store_true", help="use cache files that exist without looking into them"
    )
    group.add_argument(
        "--cache_text_encoder_outputs",
        action="store_true",
        help="encode all captions once, and free the text encoders; not with captions that vary",
    )
    group.add_argument("--cache_text_encoder_outputs_to_disk", action="store_true", help="the same, in files")
    group.add_argument(
        "--text_encoder_batch_size",
        type=int,
        help="captions to encode at once; default: --train_batch_size",
    )
