"""Encode the captions of a dataset with Wan2.1's text encoder, for training.

All options: python wan_cache_text_encoder_outputs.py --help
"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import read_text_caching
from families import identify
from modules.command import as_typed, command_line
from wan.options import WanTextCachingOptions


def main(argv: Sequence[str] | None = None, run: Callable[..., None] | None = None) -> None:
    """Cache. run: called with what would be cached, in place of it (cache_on_ray.py)."""
    options, wan_options = read_text_caching(__doc__, WanTextCachingOptions, argv)
    config = load_dataset_config(options.dataset_config)

    from dataset.commands import run_text_caching  # torch loads here, after every option has been read
    from wan.family import family_for_text_caching

    following = as_typed(
        ["python", "wan_train_network.py", "--dataset_config", str(options.dataset_config), "--check"]
    )
    (run or run_text_caching)(family_for_text_caching(wan_options), config, options, following)


if __name__ == "__main__":
    command_line(main, explain=identify)
