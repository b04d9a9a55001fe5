"""Make the training scripts of a family: read its options, then hand it to the training loop."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from modules.dit_options import refuse_for_whole
from modules.families import FAMILIES
from modules.installation import import_own
from modules.options import option_values
from modules.parser import add_options
from modules.scripts import Script
from networks.options import add_network_arguments
from training.image_options import ImageTrainerDefaults, image_training_parser, read_image_training
from training.options import read_training
from training.whole_dit_options import add_whole_dit_arguments


def training_script(
    family: str,
    about: str | None,
    *,
    whole: bool = False,
    images: ImageTrainerDefaults | None = None,
    add_more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    check: Callable[[Any], None] = lambda own: None,
) -> Script:
    """Return the script that trains a LoRA for a family, or with `whole` its transformer.

    about: the script's docstring. images: what differs between image families; None for video. add_more:
    declares options besides the family's. check: raises OptionError if the family's options do not fit.
    """
    entry = FAMILIES[family]
    add_learner = add_whole_dit_arguments if whole else add_network_arguments

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_options(parser, entry.options_record("Training"))
        add_more(parser)

    def train(argv: Sequence[str] | None = None) -> None:
        record = entry.options_record("Training")
        if images is None:
            options, own = read_training(about, record, argv, add_learner, add_more)
        else:
            options, own = read_image_training(about, record, images, argv)
        if whole:
            refuse_for_whole(option_values(own).get("dit_dtype"))
        check(own)

        from dataset.batches.finding import CachingCommands
        from training.following import FamilyScripts
        from training.run import train_network  # torch loads here, after every option has been read

        made = entry.make_family("training", own)
        # options of the caching script that follow from the checkpoint
        switches = getattr(made, "caching_switches", ())
        commands = entry.options.caching_commands(
            options.loop.dataset_config, own, *([switches] if switches else [])
        )
        scripts = FamilyScripts(
            f"{entry.script}_train{'' if whole else '_network'}.py",
            add_arguments,
            partial(entry.options.generation_words, own),
            add_learner,
            None if images is None else partial(image_training_parser, None, images),
        )
        make_sampling = getattr(import_own(f"{entry.room}.family"), "family_for_samples", lambda own: None)
        code = train_network(made, options, CachingCommands(*commands), scripts, make_sampling(own))
        if code:
            raise SystemExit(code)

    return Script(train)
