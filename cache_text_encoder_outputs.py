"""Encode the captions of a dataset with HunyuanVideo's text encoders for training, of SkyReels V1 too.

All options: python cache_text_encoder_outputs.py --help
"""

import argparse
from collections.abc import Sequence

from dataset.config import load_dataset_config
from dataset.options import CachingOptions, add_caching_arguments
from families import identify
from hunyuan_model.options import HunyuanTextCachingOptions, add_text_caching_arguments
from modules.command import command_line
from modules.options import read_options, refuse_unsupported


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_caching_arguments(parser)
    add_text_caching_arguments(parser)
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    options, hunyuan_options = read_options(CachingOptions, args), read_options(HunyuanTextCachingOptions, args)
    config = load_dataset_config(options.dataset_config)

    from dataset.modes import run_text_caching  # torch loads here, after every option has been read
    from hunyuan_model.family import family_for_text_caching

    run_text_caching(family_for_text_caching(hunyuan_options), config, options)


if __name__ == "__main__":
    command_line(main, explain=identify)
