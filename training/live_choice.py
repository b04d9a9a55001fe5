"""Decide which texts of a run are encoded while training, before anything is loaded."""

import logging
from collections.abc import Mapping, Sequence

from dataset.cache.files import text_file_name
from dataset.cache.store import Stores
from dataset.caching.existing import npz_names
from dataset.config import DatasetConfig
from modules.contract.family import Family, LearningEncoder, TextEncoder, can_learn
from modules.errors import OptionError
from networks.own_modules import OWN_MODULES
from training.data.live_text import NO_TEXTS, LiveTexts
from training.options import TrainingOptions

logger = logging.getLogger(__name__)

UNET_ONLY = "--network_train_unet_only"


def choose_live_texts(family: Family, options: TrainingOptions, config: DatasetConfig) -> LiveTexts:
    """Return the encoders that have to stay loaded: for captions that vary, and those that learn.

    Without any, all texts come from caches, if these are there. Raises OptionError if caches are asked for
    texts that change, or if an encoder that is needed is not given.
    """
    asked = options.caching is not None and options.caching.caches_texts
    varying = next((table for table in config.datasets if table.changes.varying_keys), None)
    if varying is not None and asked:
        raise OptionError(
            f"--cache_text_encoder_outputs: captions of {varying.name} vary (shuffle_caption, wildcards, tag "
            "dropout or token warm-up), so that they cannot be cached. Leave out one of the two"
        )
    if varying is None and not _may_learn(options):
        return NO_TEXTS
    encoders = _encoders(
        family, "captions vary" if varying is not None else f"they are trained without {UNET_ONLY}"
    )
    able = [encoder for encoder in encoders if can_learn(encoder)]
    learning = _learning(family, options, able)
    prefixes = [encoder.lora_prefix for encoder in able]
    if varying is not None:
        return LiveTexts(encoders, learning, prefixes)
    if not learning:
        return NO_TEXTS
    if not asked:
        return LiveTexts(encoders, learning, prefixes)
    if len(learning) == len(encoders):
        # they do not learn because all texts are cached, as the guides' commands have it
        names = ", ".join(encoder.name for encoder in learning)
        if options.parts is None or not options.parts.trains_dit:
            raise OptionError(
                f"--cache_text_encoder_outputs: {names} is trained, so that its outputs change. Leave it out"
            )
        logger.info(
            "%s does not learn because --cache_text_encoder_outputs keeps its outputs: only the transformer "
            "is trained, as with %s. To train both leave out the caches.",
            names,
            UNET_ONLY,
        )
        return NO_TEXTS
    return LiveTexts(learning, learning, prefixes)


def find_live_texts(family: Family, options: TrainingOptions, config: DatasetConfig) -> LiveTexts:
    """Return the encoders that stay loaded; none if all texts come from caches. Raises OptionError."""
    texts = choose_live_texts(family, options, config)
    is_asked = options.caching is not None and options.caching.caches_texts
    if texts.encoders or is_asked or not options.is_for_images:
        return texts
    stores, end = Stores(npz_names(family)), text_file_name("", family.cache_tag)
    if any(name.endswith(end) for table in config.datasets for name in stores.of(table).names()):
        return NO_TEXTS
    return LiveTexts(_encoders(family, "there are no text caches"))


def _may_learn(options: TrainingOptions) -> bool:
    return options.parts is not None and options.parts.trains_texts and options.network is not None


def _encoders(family: Family, why: str) -> Sequence[TextEncoder]:
    """Return the text encoders. Raises OptionError that says why they are needed, if one is not given."""
    try:
        return family.text_encoders()
    except OptionError as error:
        raise OptionError(f"{error}\n  Text encoders are needed because {why}.") from None


def _learning(
    family: Family, options: TrainingOptions, able: Sequence[LearningEncoder]
) -> list[LearningEncoder]:
    """Return the encoders that get a network, of those that can learn.

    Raises OptionError if nothing but text encoders is to be trained, and none can be.
    """
    if not _may_learn(options) or options.network is None or options.parts is None:
        return []
    options.parts.text_rates(len(able), options.optimizer.learning_rate)  # too many are refused here
    name = options.network.network_module or family.lora_module
    own = OWN_MODULES.get(name)
    if able and own is not None and own.kind != "LoRA":
        raise OptionError(
            f"--network_module {name} has no part for text encoders: add {UNET_ONLY}, or use a LoRA module"
        )
    arguments = options.network.arguments()
    switches: Mapping[str, str] = {} if own is None or own.rules is None else own.rules.encoders
    off = {prefix for name, prefix in switches.items() if arguments.get(name, "").lower() != "true"}
    learning = [encoder for encoder in able if encoder.lora_prefix not in off]
    if not learning and not options.parts.trains_dit:
        raise OptionError(
            "--network_train_text_encoder_only: this model has no text encoder that can be trained. Leave it "
            "out"
        )
    return learning
