"""Make the caching scripts of a family, which read the options and call the caching loop."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dataset.cache.commands import recall_options, remember_options
from dataset.config import (
    DatasetConfig,
    for_family,
    load_dataset_config,
    with_audio_files,
    with_downloads,
    with_empty_prompts,
)
from dataset.options import CachingOptions, DebugOptions, EmptyPromptOptions
from modules.command import begin_loading, name_as_typed
from modules.option_values import option_argv, require
from modules.options import option_values
from modules.repeated_options import RepeatedOption, join_options, repeat_given
from modules.script_options import parse_with_flags
from protocols.families import FAMILIES, Script


def caching_script(
    family: str,
    kind: str,
    about: str | None,
    on_completed: Callable[[Any, Any, DatasetConfig], None] | None = None,
) -> Script:
    """Return a caching script of a family.

    The returned function takes `argv` and `run_instead`, like `cache_family_latents`.

    Args:
        family: Name of the family.
        kind: `latents` or `texts`.
        about: Docstring of the script.
        on_completed: Called with the family's options, the family and the dataset when all texts are cached.
    """
    if kind == "latents":
        return Script.for_family(family, partial(cache_family_latents, family, about))
    return Script.for_family(family, partial(cache_family_texts, family, about, on_completed=on_completed))


def cache_family_latents(
    family: str,
    about: str | None,
    argv: Sequence[str] | None = None,
    run_instead: Callable[..., None] | None = None,
) -> None:
    """Encode the images and clips of a dataset: the main function of the scripts that cache latents.

    1. Read the options, and require the files of the encoders.
    2. Load the dataset file, and the family with torch.
    3. Run the caching loop, or `run_instead`.

    Args:
        family: Name of the family.
        about: Docstring of the script, shown by --help.
        argv: Arguments; None for sys.argv.
        run_instead: Called with the arguments of the caching loop, instead of it. tools/cache_on_ray.py
            passes a function that only checks them.
    """
    entry = FAMILIES[family]
    record = entry.options_record("LatentCaching")
    records, typed = parse_with_flags(about, argv, CachingOptions, record, DebugOptions)
    options, family_options, debug = records
    if debug.debug_mode is not None:
        options.shard.reject_beside("--debug_mode")
    with name_as_typed(options.typed_names):
        if debug.debug_mode is None and not options.check:
            values = option_values(family_options)
            for name, option, why in entry.encoders:  # files without which nothing can be encoded
                require(values[name], option, f"{why}; only --debug_mode and --check work without it")
        # only families with audio have the option that says where the audio files are
        config = _load_dataset(options, getattr(family_options, "audio_files", None))
        if entry.notice:
            entry.log_notice()
        begin_loading()
        from dataset.caching import loop  # torch loads here, after every option has been read

        caches = entry.make_family("latent_caching", family_options)
        config = for_family(config, caches)
        command = [
            *_text_caching_command(config, family, family_options, typed),
            *option_argv({"--dataset_config": options.dataset_config, "--device": options.device}),
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
        next_command = loop.NextCommand(command, remember)
        cache = run_instead or partial(loop.run_caching, loop.LATENTS)
        cache(caches, config, options, debug, next_command)


def _load_dataset(
    options: CachingOptions, audio_files: tuple[str, Path | None] | None = None
) -> DatasetConfig:
    """Load the dataset file, with the folders for downloads and audio that are set on the command line."""
    # `audio_files` is the option about audio files, and their folder; None as the folder means that they are
    # next to the clips.
    # not needed for --help

    config = load_dataset_config(options.dataset_config)
    if options.download_directory is not None:
        config = with_downloads(config, options.download_directory)
    if audio_files is not None:
        config = with_audio_files(config, *audio_files)
    return config


def cache_family_texts(
    family: str,
    about: str | None,
    argv: Sequence[str] | None = None,
    run_instead: Callable[..., None] | None = None,
    on_completed: Callable[[Any, Any, DatasetConfig], None] | None = None,
) -> None:
    """Encode the captions of a dataset: the main function of the scripts that cache text embeddings.

    1. Read the options and the dataset file, and load the family with torch.
    2. Compose the training command, which the caching loop shows as the next step.
    3. Run the caching loop, or `run_instead`.

    Args:
        family: Name of the family.
        about: Docstring of the script, shown by --help.
        argv: Arguments; None for sys.argv.
        run_instead: Called with the arguments of the caching loop, instead of it.
        on_completed: Called with the family's options, the family and the dataset when all texts are cached.
    """
    entry = FAMILIES[family]
    record = entry.options_record("TextCaching")
    records, typed = parse_with_flags(about, argv, CachingOptions, EmptyPromptOptions, record)
    options, empty_prompt_options, family_options = records
    with name_as_typed(options.typed_names):
        config = _load_dataset(options)

        if entry.notice:
            entry.log_notice()
        begin_loading()
        from dataset.caching import loop  # torch loads here, after every option has been read

        caches = entry.make_family("text_caching", family_options)
        config = for_family(config, caches, for_texts=True)
        # some families have an option that requires the empty prompt
        if empty_prompt_options.empty_prompt or getattr(family_options, "caches_empty_prompt", False):
            config = with_empty_prompts(config)
        # the training command, which is shown next: it repeats the options of both caching commands
        repeated = [*repeat_given(family_options, typed), *_recall(config, family, "LatentCaching")]
        training = option_argv(join_options(entry.options_record("Training"), {}, repeated))
        command = ["python", f"{entry.training_script}.py", *entry.training, *training]
        command += ["--dataset_config", str(options.dataset_config), "--check"]
        remember = partial(
            remember_options,
            config,
            family,
            "TextCaching",
            family_options=family_options,
            typed=typed,
        )
        next_command = loop.NextCommand(command, remember)
        cache = run_instead or partial(loop.run_caching, loop.TEXTS)
        cache(caches, config, options, None, next_command)
        # with shards, only the command that runs last has all texts
        if on_completed is not None and run_instead is None and options.shard.num_shards is None:
            on_completed(family_options, caches, config)


def _text_caching_command(
    config: DatasetConfig, family: str, family_options: Any, typed: Mapping[str, str]
) -> list[str]:
    """Return the command that caches captions, without the options that all families share."""
    # Options are taken from an earlier command of that kind in the cache folders, and from this command.

    entry = FAMILIES[family]
    recalled = _recall(config, family, "TextCaching")
    has_encoders = any(isinstance(option.value, Path) for option in recalled)
    # placeholders for the paths of text encoders, unless an earlier command named them
    encoders = {} if has_encoders else entry.text_encoder_options(family_options)
    repeated = [*repeat_given(family_options, typed), *recalled]
    joined = join_options(entry.options_record("TextCaching"), encoders, repeated)
    return ["python", f"{entry.cache}_text_encoder_outputs.py", *option_argv(joined)]


def _recall(config: DatasetConfig, family: str, kind: str) -> list[RepeatedOption]:
    """Return the options of the last caching command of this kind, as stored in the cache folders."""
    folders = (table.cache_directory for table in config.datasets)
    return recall_options(folders, family, entry=FAMILIES[family], kinds=(kind,), for_training=True)
