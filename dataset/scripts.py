"""Make the caching scripts of a family: read its options, then hand it to the caching loop."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dataset.cache.commands import recall_options, remember_options
from dataset.config import DatasetConfig, for_family, load_dataset_config, with_downloads, with_sound_files
from dataset.options import CachingOptions, read_spelled_caching
from modules.command import name_as_typed, tell_loading
from modules.families import FAMILIES, Script
from modules.option_values import option_words, require
from modules.options import option_values
from modules.parser import parse_spelled
from modules.repeated_options import RepeatedOption, join_options, repeat_given


def caching_script(family: str, kind: str, about: str | None) -> Script:
    """Return the script that caches `latents` or `texts` of a family. about: the script's docstring.

    The script's function takes a second argument, for cache_on_ray.py: a function that is called with what
    would be cached, in place of caching.
    """
    return Script(partial(cache_family_latents if kind == "latents" else cache_family_texts, family, about))


def cache_family_latents(
    family: str, about: str | None, argv: Sequence[str] | None = None, run: Callable[..., None] | None = None
) -> None:
    """Encode the images and clips of a dataset."""
    entry = FAMILIES[family]
    options, debug, own, typed = read_spelled_caching(about, entry.options_record("LatentCaching"), argv)
    with name_as_typed(options.typed_names):
        if debug.debug_mode is None and not options.check:
            values = option_values(own)
            for name, option, why in entry.encoders:
                require(values[name], option, f"{why}; only --debug_mode and --check work without it")
        config = with_downloads(load_dataset_config(options.dataset_config), options.download_directory)
        sounds = getattr(own, "sound_files", None)  # of families that hear, whose options may say where it is
        if sounds is not None:
            config = with_sound_files(config, *sounds)

        tell_loading()
        from dataset.caching import loop  # torch loads here, after every option has been read

        made = entry.make_family("latent_caching", own)
        config = for_family(
            config, made.references, made.latent.frame_step, made.latent.in_sections, made.can.references
        )
        words = [*_caption_words(config, family, own, typed), *_shared_words(options)]
        training = entry.training_options(own, made)
        remember = partial(remember_options, config, family, "LatentCaching", own, typed, training)
        following = loop.NextCommand(words, remember)
        (run or partial(loop.run_caching, loop.LATENTS))(made, config, options, debug, following)


def cache_family_texts(
    family: str, about: str | None, argv: Sequence[str] | None = None, run: Callable[..., None] | None = None
) -> None:
    """Encode the captions of a dataset."""
    entry = FAMILIES[family]
    records, typed = parse_spelled(about, argv, CachingOptions, entry.options_record("TextCaching"))
    options, own = records
    with name_as_typed(options.typed_names):
        config = with_downloads(load_dataset_config(options.dataset_config), options.download_directory)

        tell_loading()
        from dataset.caching import loop  # torch loads here, after every option has been read

        made = entry.make_family("text_caching", own)
        # texts are the same whatever the keys of sections say
        config = for_family(config, made.references, made.latent.frame_step, True, made.can.references)
        repeated = [*repeat_given(own, typed), *_recall(config, family, "LatentCaching")]
        checked = option_words(join_options(entry.options_record("Training"), {}, repeated))
        words = ["python", f"{entry.script}_train_network.py", *entry.training, *checked]
        words += ["--dataset_config", str(options.dataset_config), "--check"]
        remember = partial(remember_options, config, family, "TextCaching", own, typed)
        following = loop.NextCommand(words, remember)
        (run or partial(loop.run_caching, loop.TEXTS))(made, config, options, None, following)


def _caption_words(config: DatasetConfig, family: str, own: Any, typed: Mapping[str, str]) -> list[str]:
    """Return the command that caches captions, but for its shared options.

    own, typed: the family's options of the command that caches latents, and how they were spelled.
    """
    entry = FAMILIES[family]
    recalled = _recall(config, family, "TextCaching")
    is_known = any(isinstance(option.value, Path) for option in recalled)
    encoders = {} if is_known else entry.text_encoder_options(own)
    repeated = [*repeat_given(own, typed), *recalled]
    joined = join_options(entry.options_record("TextCaching"), encoders, repeated)
    return ["python", f"{entry.cache}_text_encoder_outputs.py", *option_words(joined)]


def _recall(config: DatasetConfig, family: str, kind: str) -> list[RepeatedOption]:
    """Return the options with which the other half of the caches was made, if it was made here before."""
    folders = (table.cache_directory for table in config.datasets)
    return recall_options(folders, family, FAMILIES[family], (kind,), for_training=True)


def _shared_words(options: CachingOptions) -> list[str]:
    return option_words({"--dataset_config": options.dataset_config, "--device": options.device})
