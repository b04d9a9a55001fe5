"""Make the caching scripts of a family: read its options, then hand it to the caching loop."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.options import CachingOptions, DebugOptions, EmptyPromptOptions
from modules.command import name_as_typed, print_loading
from modules.option_values import option_words, require
from modules.options import option_values
from modules.script_options import parse_spelled
from protocols.families import FAMILIES, Script

if TYPE_CHECKING:
    from dataset.config import DatasetConfig
    from modules.repeated_options import RepeatedOption


def caching_script(
    family: str,
    kind: str,
    about: str | None,
    finish: Callable[[Any, Any, "DatasetConfig"], None] | None = None,
) -> Script:
    """Return the script that caches `latents` or `texts` of a family.

    `about` is the script's docstring.

    `finish` is called with the family's options, the family and the dataset when all texts are cached. The
    script's function takes a second argument, for cache_on_ray.py: a function that is called with what would
    be cached, in place of caching.
    """
    if kind == "latents":
        return Script.of_family(family, partial(cache_family_latents, family, about))
    return Script.of_family(family, partial(cache_family_texts, family, about, finish=finish))


def cache_family_latents(
    family: str, about: str | None, argv: Sequence[str] | None = None, run: Callable[..., None] | None = None
) -> None:
    """Encode the images and clips of a dataset."""
    entry = FAMILIES[family]
    record = entry.options_record("LatentCaching")
    records, typed = parse_spelled(about, argv, CachingOptions, record, DebugOptions)
    options, family_options, debug = records
    if debug.debug_mode is not None:
        options.shard.reject_beside("--debug_mode")
    # not for --help
    from dataset.config import (
        for_family,
        load_dataset_config,
        with_audio_files,
        with_downloads,
    )

    with name_as_typed(options.typed_names):
        if debug.debug_mode is None and not options.check:
            values = option_values(family_options)
            for name, option, why in entry.encoders:
                require(values[name], option, f"{why}; only --debug_mode and --check work without it")
        config = load_dataset_config(options.dataset_config)
        if options.download_directory is not None:
            config = with_downloads(config, options.download_directory)
        # of families with audio, whose options may say where the sound is
        audio_files = getattr(family_options, "audio_files", None)
        if audio_files is not None:
            config = with_audio_files(config, *audio_files)

        if entry.notice:
            entry.say_notice()
        print_loading()
        from dataset.cache.commands import remember_options
        from dataset.caching import loop  # torch loads here, after every option has been read

        caches = entry.make_family("latent_caching", family_options)
        config = for_family(config, caches)
        words = [
            *_caption_words(config, family, family_options, typed),
            *option_words({"--dataset_config": options.dataset_config, "--device": options.device}),
        ]
        remember = partial(
            remember_options,
            config,
            family,
            "LatentCaching",
            family_options=family_options,
            typed=typed,
            training=entry.training_options(family_options, caches),
        )
        following = loop.NextCommand(words, remember)
        cache = run or partial(loop.run_caching, loop.LATENTS)
        cache(caches, config, options, debug, following)


def cache_family_texts(
    family: str,
    about: str | None,
    argv: Sequence[str] | None = None,
    run: Callable[..., None] | None = None,
    finish: Callable[[Any, Any, "DatasetConfig"], None] | None = None,
) -> None:
    """Encode the captions of a dataset.

    For `finish` see `caching_script`.
    """
    entry = FAMILIES[family]
    record = entry.options_record("TextCaching")
    records, typed = parse_spelled(about, argv, CachingOptions, EmptyPromptOptions, record)
    options, empty_prompt_options, family_options = records
    # not for --help
    from dataset.config import for_family, load_dataset_config, with_downloads, with_empty_prompts
    from modules.repeated_options import join_options, repeat_given

    with name_as_typed(options.typed_names):
        config = load_dataset_config(options.dataset_config)
        if options.download_directory is not None:
            config = with_downloads(config, options.download_directory)

        if entry.notice:
            entry.say_notice()
        print_loading()
        from dataset.cache.commands import remember_options
        from dataset.caching import loop  # torch loads here, after every option has been read

        caches = entry.make_family("text_caching", family_options)
        config = for_family(config, caches, for_texts=True)
        # by an option of the family's own, too
        if empty_prompt_options.empty_prompt or getattr(family_options, "caches_empty_prompt", False):
            config = with_empty_prompts(config)
        repeated = [*repeat_given(family_options, typed), *_recall(config, family, "LatentCaching")]
        training = option_words(join_options(entry.options_record("Training"), {}, repeated))
        words = ["python", f"{entry.training_script}.py", *entry.training, *training]
        words += ["--dataset_config", str(options.dataset_config), "--check"]
        remember = partial(
            remember_options,
            config,
            family,
            "TextCaching",
            family_options=family_options,
            typed=typed,
        )
        following = loop.NextCommand(words, remember)
        cache = run or partial(loop.run_caching, loop.TEXTS)
        cache(caches, config, options, None, following)
        if finish is not None and run is None and options.shard.num_shards is None:
            finish(family_options, caches, config)


def _caption_words(
    config: "DatasetConfig", family: str, family_options: Any, typed: Mapping[str, str]
) -> list[str]:
    """Return the command that caches captions, except for its shared options.

    `family_options` and `typed` are the family's options of the command that caches latents, and how they
    were spelled.
    """
    from modules.repeated_options import join_options, repeat_given

    entry = FAMILIES[family]
    recalled = _recall(config, family, "TextCaching")
    has_encoders = any(isinstance(option.value, Path) for option in recalled)
    encoders = {} if has_encoders else entry.text_encoder_options(family_options)
    repeated = [*repeat_given(family_options, typed), *recalled]
    joined = join_options(entry.options_record("TextCaching"), encoders, repeated)
    return ["python", f"{entry.cache}_text_encoder_outputs.py", *option_words(joined)]


def _recall(config: "DatasetConfig", family: str, kind: str) -> "list[RepeatedOption]":
    """Return the options with which the other half of the caches was made, if it was made here before."""
    from dataset.cache.commands import recall_options  # not for --help: it loads hashlib

    folders = (table.cache_directory for table in config.datasets)
    return recall_options(folders, family, entry=FAMILIES[family], kinds=(kind,), for_training=True)
