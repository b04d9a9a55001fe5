"""Encode the captions of a dataset with Wan2.1's text encoder for training.

All options: python wan_cache_text_encoder_outputs.py --help
"""

import argparse
from collections.abc import Sequence

from dataset.config import load_dataset_config
from dataset.options import CachingOptions, add_caching_arguments
from families import identify
from modules.command import command_line
from modules.options import read_options, refuse_unsupported
from wan.options import WanTextCachingOptions, add_text_caching_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_caching_arguments(parser)
    add_text_caching_arguments(parser)
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    options, wan_options = read_options(CachingOptions, args), read_options(WanTextCachingOptions, args)
    config = load_dataset_config(options.dataset_config)

    from dataset.modes import run_text_caching  # torch loads here, after every option has been read
    from wan.family import family_for_text_caching

    run_text_caching(family_for_text_caching(wan_options), config, options)


if __name__ == "__main__":
    command_line(main, explain=identify)
