"""Options of the caches that the image trainers make inside the training command."""

import argparse
from dataclasses import dataclass

from dataset.options import MOST_AT_ONCE
from modules.options import check_at_least, check_at_most


@dataclass(frozen=True)
class CachingInsideOptions:
    """What is encoded before training, and where it is kept."""

    cache_latents: bool  # in host memory
    cache_latents_to_disk: bool  # in npz files beside the pictures; includes the one above
    vae_batch_size: int
    cache_text_encoder_outputs: bool
    cache_text_encoder_outputs_to_disk: bool
    text_encoder_batch_size: int | None  # None: the batch size of each dataset
    skip_cache_check: bool  # npz files that are there are taken to be right

    def __post_init__(self) -> None:
        sizes = {
            "--vae_batch_size": self.vae_batch_size,
            "--text_encoder_batch_size": self.text_encoder_batch_size,
        }
        for option, size in sizes.items():
            check_at_least(option, size, 1, "how many to encode at once")
            check_at_most(option, size, MOST_AT_ONCE, "to encode at once")

    @property
    def latents_cached(self) -> bool:
        """Return whether latents are asked to be cached, wherever."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def texts_cached(self) -> bool:
        """Return whether embeddings of captions are asked to be cached, wherever."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk


def add_caching_inside_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `CachingInsideOptions`."""
    group = parser.add_argument_group("caching inside the training command")
    group.add_argument(
        "--cache_latents",
        action="store_true",
        help="encode all pictures before training and keep the latents in host memory",
    )
    group.add_argument(
        "--cache_latents_to_disk",
        action="store_true",
        help="encode all pictures before training, into npz files beside them that later runs read; files of "
        "other trainers in this layout are read too",
    )
    group.add_argument(
        "--vae_batch_size", type=int, default=1, help="pictures to encode at once; default: 1"
    )
    group.add_argument(
        "--cache_text_encoder_outputs",
        action="store_true",
        help="encode all captions before training and keep their embeddings in host memory; captions must "
        "not vary",
    )
    group.add_argument(
        "--cache_text_encoder_outputs_to_disk",
        action="store_true",
        help="encode all captions before training, into npz files beside the pictures that later runs read",
    )
    group.add_argument(
        "--text_encoder_batch_size",
        type=int,
        default=None,
        help="captions to encode at once; default: batch_size of each dataset",
    )
    group.add_argument(
        "--skip_cache_check",
        action="store_true",
        help="take every npz file that is there to be right, without opening it before it is needed",
    )
