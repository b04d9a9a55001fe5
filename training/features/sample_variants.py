"""Sample each prompt at several strengths of the LoRA, and the bare trigger word: --sample_strengths.

The variants are additional entries of the prompt file: each is sampled, named and shown as its own prompt.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from generation.sample_lines import PROMPT_KEY, SECOND_PROMPT_KEY, STRENGTH_KEY
from modules.errors import OptionError
from modules.options import FREE, SAMPLES_ONLY, option
from training.features.contract import AT_WEIGHTS, Feature, FeatureOptions
from training.features.hooks import PlannedRun, RunFeatures

if TYPE_CHECKING:
    from protocols.family import Family

Entry = Mapping[str, Any]  # a prompt with its options, by key
MAX_STRENGTH = 100  # beyond any use of a LoRA


class SampleVariantOptions(
    FeatureOptions, title="samples in variants", at=AT_WEIGHTS, facts={**FREE, **SAMPLES_ONLY}
):
    """Options for additional samples of each round."""

    sample_strengths: tuple[float, ...] | None = option(
        "sample each prompt at each of these strengths of the LoRA, such as 0.5 1; a line with --lm has its "
        "own strength",
        minimum=-MAX_STRENGTH,
        maximum=MAX_STRENGTH,
        metavar="STRENGTH",
        hint="0.5 1 shows whether the LoRA is too strong",
    )
    sample_trigger_word: bool = option(
        "also sample each trigger word of the dataset alone, with the settings of the first prompt"
    )


def add_variants(
    options: SampleVariantOptions, words: Sequence[str], entries: Sequence[Entry]
) -> list[Entry]:
    """Return the entries of a prompt file, with the bare words after them, each at each strength.

    Args:
        options: Which variants there are.
        words: Trigger words, which are sampled alone if the options ask for it.
        entries: Entries of the prompt file.
    """
    prompts = [*entries]
    if options.sample_trigger_word:
        first = {key: value for key, value in entries[0].items() if key != SECOND_PROMPT_KEY}
        prompts += [{**first, PROMPT_KEY: word} for word in words]
    if options.sample_strengths is None:
        return prompts
    variants: list[Entry] = []
    for prompt in prompts:
        if prompt.get(STRENGTH_KEY) is not None:
            variants.append(prompt)
        else:
            variants += [{**prompt, STRENGTH_KEY: strength} for strength in options.sample_strengths]
    return variants


def _list_trigger_words(run: RunFeatures) -> list[str]:
    """Return the trigger words of the tables and the words that are learned, each once."""
    words = [table.captions.trigger_word.strip() for table in run.tables]
    return [*dict.fromkeys(word for word in (*words, *run.embedding_words) if word)]


def _check_network(run: RunFeatures, family: "Family", counts: Sequence[int]) -> None:
    """Raise OptionError if what is trained has no strength."""
    from protocols.family_networks import get_custom_network  # not needed for --help

    network = get_custom_network(family)
    if network is not None:
        raise OptionError(
            f"--sample_strengths is for LoRAs, and this run trains a {network.label}: set its strength "
            "in the prompt lines with --am"
        )
    if run.lora_replacement is not None:
        raise OptionError(
            "--sample_strengths is for LoRAs, and this run trains a word alone, which has no strength. Omit "
            "--sample_strengths"
        )


def _check_words(run: RunFeatures, planned: PlannedRun) -> None:
    if not _list_trigger_words(run):
        raise OptionError(
            "--sample_trigger_word: no table of the dataset has a trigger_word. Add one to the table, or "
            "write a prompt with the word alone into the file of --sample_prompts"
        )


def _join(run: RunFeatures, options: SampleVariantOptions) -> None:
    if options.sample_strengths is not None:
        if run.options.full_dit is not None:
            raise OptionError(
                "--sample_strengths is for LoRAs, and this run trains the whole model, which has no "
                "strength. Omit --sample_strengths"
            )
        run.on.check.append(partial(_check_network, run))
    if options.sample_trigger_word:
        run.on.plan.append(partial(_check_words, run))
    run.sample_entries.append(partial(add_variants, options, _list_trigger_words(run)))


SAMPLE_VARIANTS = Feature(
    name="sample_variants",
    options=SampleVariantOptions,
    is_on=lambda options: options.sample_strengths is not None or options.sample_trigger_word,
    join=_join,
)
