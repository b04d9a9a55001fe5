"""Make the caching scripts of a family: read its options, then hand it to the caching loop."""

from collections.abc import Callable, Sequence
from functools import partial

from dataset.config import for_family, load_dataset_config, with_downloads, with_sound_files
from dataset.options import CachingOptions, read_latent_caching
from modules.command import as_typed, name_as_typed, tell_loading
from modules.families import FAMILIES, Script
from modules.option_values import require
from modules.options import option_values
from modules.parser import parse_options


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
    options, debug, own = read_latent_caching(about, entry.options_record("LatentCaching"), argv)
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

        words = ["python", f"{entry.cache}_text_encoder_outputs.py", *entry.texts.split()]
        words += [*entry.repeat_options(own), "--dataset_config", str(options.dataset_config)]
        made = entry.make_family("latent_caching", own)
        config = for_family(
            config, made.references, made.latent.frame_step, made.latent.in_sections, made.can.references
        )
        (run or partial(loop.run_caching, loop.LATENTS))(made, config, options, debug, as_typed(words))


def cache_family_texts(
    family: str, about: str | None, argv: Sequence[str] | None = None, run: Callable[..., None] | None = None
) -> None:
    """Encode the captions of a dataset."""
    entry = FAMILIES[family]
    options, own = parse_options(about, argv, CachingOptions, entry.options_record("TextCaching"))
    with name_as_typed(options.typed_names):
        config = with_downloads(load_dataset_config(options.dataset_config), options.download_directory)

        tell_loading()
        from dataset.caching import loop  # torch loads here, after every option has been read

        words = ["python", f"{entry.script}_train_network.py", *entry.training, *entry.repeat_options(own)]
        words += ["--dataset_config", str(options.dataset_config), "--check"]
        made = entry.make_family("text_caching", own)
        # texts are the same whatever the keys of sections say
        config = for_family(config, made.references, made.latent.frame_step, True, made.can.references)
        (run or partial(loop.run_caching, loop.TEXTS))(made, config, options, None, as_typed(words))
