"""Compose the options of all features, and let the active ones join a run. Standard library only."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modules.errors import OptionError
from modules.options import Options, find_record_type, get_option_info, option, resolve_type_hints
from training.features import FEATURES
from training.features.contract import AGAINST_BAD_STEPS, AT_NETWORK
from training.features.hooks import RunEnd, RunFeatures

if TYPE_CHECKING:
    from dataset.table import DatasetTable
    from protocols.family import Described
    from training.features.hooks import RunOptionsProtocol

logger = logging.getLogger(__name__)


def options_at(place: str) -> type[Options]:
    """Return an options class with a field for each feature whose options are at this position of --help."""
    records = {feature.name: feature.options for feature in FEATURES if feature.options.place == place}
    content: dict[str, Any] = {name: option(facts=record.facts) for name, record in records.items()}
    content["__annotations__"] = records
    return type("RunFeatureOptions", (Options,), content)


def list_info() -> dict[str, Mapping[str, Any]]:
    """Return the metadata of all feature options, by option name."""
    by_name: dict[str, Mapping[str, Any]] = {}
    for feature in FEATURES:
        by_name |= get_option_info(feature.options)
    return by_name


def list_block_feature_options() -> list[str]:
    """Return the names of feature options that work only on models with transformer blocks."""
    return [name for name, info in list_info().items() if info.get("of_blocks")]


def options_by_expert() -> list[type[Options]]:
    """Return the option classes of features that apply to the second of two transformers."""
    hints = [hint for feature in FEATURES for hint in resolve_type_hints(feature.options).values()]
    return [record for record in map(find_record_type, hints) if record is not None]


def rejected_for_full() -> dict[str, str]:
    """Map each feature option that needs a LoRA to the reason why full fine-tuning rejects it."""
    records = [feature.options for feature in FEATURES if feature.options.place == AT_NETWORK]
    return {name: record.why_not_full for record in records for name in get_option_info(record)}


def bad_step_remedies() -> str:
    """Return sentences about feature options that help against a NaN or infinite loss or norm."""
    remedies = [info.get(AGAINST_BAD_STEPS, "") for info in list_info().values()]
    return " ".join(filter(None, remedies))


def join_run(options: "RunOptionsProtocol", tables: "Sequence[DatasetTable]" = ()) -> RunFeatures:
    """Let each active feature register its functions, targets and needs; return all of them.

    Args:
        options: All options of the run.
        tables: The tables of its dataset that are known so far.

    Raises:
        OptionError: If options or tables conflict with each other.
    """
    run = RunFeatures(options, tables)
    attributes = {name for table in tables for name in table.learning.attributes}
    for feature in FEATURES:
        feature_options = options.of(feature.options)
        # a feature is turned on by its options, or by an attribute in a dataset table
        if feature.is_on(feature_options) or feature.options.attribute in attributes:
            feature.join(run, feature_options)
    if run.targets:
        # Raise OptionError if two training targets, such as a slider and a teacher, cannot be combined
        replacing = [target.option for target in run.targets if target.replaces_velocity]
        if len(replacing) > 1:
            raise OptionError(
                f"{replacing[0]} and {replacing[1]} both choose what is learned instead of the clip. Omit "
                "one of the two"
            )
        for target in run.targets:
            others = [other.option for other in run.targets if other is not target]
            if target.reason_to_exclude_others and others:
                reason = target.reason_to_exclude_others
                raise OptionError(f"{target.option} with {others[0]}: {reason}. Omit one of the two")
    if attributes:
        # Warn about attributes of dataset tables that no active feature reads
        known = {feature.options.attribute for feature in FEATURES}
        for table in tables:
            for name in sorted(table.learning.attributes - known):
                logger.warning("%s: custom_attributes.%s is ignored: nothing reads it", table.name, name)
    return run


def begin_run(
    options: "RunOptionsProtocol", family: "Described", tables: "Sequence[DatasetTable]" = ()
) -> RunFeatures:
    """Let the active features register, then call their `on.start` functions, which may need torch."""
    run = join_run(options, tables)
    run.family = family
    for start in run.on.start:
        start(run)
    return run


@contextlib.contextmanager
def call_end_hooks(run: RunFeatures) -> Iterator[RunEnd]:
    """Call the features' `on.end` hooks when the block ends; yields the `RunEnd` that is passed to them."""
    end = RunEnd(run, total_steps=run.options.loop.known_steps)
    try:
        yield end
    except BaseException as error:
        act_at_end(end, error)
        raise
    act_at_end(end, None)


def act_at_end(end: RunEnd, error: BaseException | None) -> None:
    """Call the features' `on.end` hooks, unless they were already called for this run.

    Args:
        end: Progress of the run so far.
        error: Error that ended the run; None if it completed.
    """
    if not end.is_due:
        return
    end.is_due = False
    end.error = error
    for act in end.run.on.end:
        act(end)
