"""Encode the captions of a dataset with MiniMax-H3's text encoder (Qwen3-VL), for training."""

from typing import TYPE_CHECKING, Any

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

if TYPE_CHECKING:
    from dataset.config import DatasetConfig
    from minimax_h3.options import H3TextCachingOptions


def write_probe(options: "H3TextCachingOptions", family: Any, config: "DatasetConfig") -> None:
    """Copy the cached text states of the empty prompt to the file of --uncond_output."""
    if options.uncond_output is None:
        return
    # not for --help
    from dataset.cache.store import Stores, npz_names
    from dataset.cache_files import empty_text_name
    from minimax_h3.cache_marks import save_empty_prompt

    store = Stores(npz_names(family)).text_store(config.datasets[0])
    entry = store.read(empty_text_name(family.cache_tag))
    save_empty_prompt(options.uncond_output, entry.tensors, options.uncond_text)


main = caching_script("minimax_h3", "texts", __doc__, on_completed=write_probe)


if __name__ == "__main__":
    main.run()
