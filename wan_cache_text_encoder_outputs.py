"""Encode the captions of a dataset with Wan2.1's text encoder for training.

All options: python wan_cache_text_encoder_outputs.py --help
"""

import argparse
import sys
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

    from dataset.caching import cache_texts  # torch loads here, after every option has been read
    from dataset.check import check_texts
    from dataset.reports import conclude
    from wan.family import family_for_text_caching

    family = family_for_text_caching(wan_options)
    if options.check:
        result = check_texts(family, config, options.skip_existing)
        sys.stdout.write("\n".join(result.lines) + "\n")
        raise SystemExit(result.exit_code)
    conclude(cache_texts(family, config, options))


if __name__ == "__main__":
    command_line(main, explain=identify)
