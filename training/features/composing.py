"""What the phases of a run ask all features for. Standard library only."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from modules.options import HABIT, Options, option
from training.features import FEATURES
from training.features.contract import Feature, Hooks, OptionsOfRun

if TYPE_CHECKING:
    from training.steps import Progress

T = TypeVar("T")


def options_at(place: str) -> type[Options]:
    """Return a record with the options of the features of a place: a field for each, by its name."""
    features = [feature for feature in FEATURES if feature.place == place]
    content: dict[str, Any] = {feature.name: option(facts=feature.facts) for feature in features}
    content["__annotations__"] = {feature.name: feature.options for feature in features}
    return type("FeatureOptions", (Options,), content)


def find_record(records: tuple[Options, ...], kind: type[T]) -> T:
    """Return the options of a feature among what `options_at` returned."""
    values = [getattr(record, field.name) for record in records for field in fields(record)]
    return next(value for value in values if isinstance(value, kind))


def active_features(options: OptionsOfRun) -> list[Feature]:
    return [feature for feature in FEATURES if feature.is_on(options.of(feature.options))]


def refuse_combinations(options: OptionsOfRun) -> None:
    """Raise OptionError for options that a feature does not go with."""
    for feature in active_features(options):
        if feature.refuse is not None:
            feature.refuse(options)


def usual_habits() -> list[Options]:
    """Return the usual options of the features that a resumed run may change.

    States of before there was a feature do not say that it was off.
    """
    return [feature.options.usual() for feature in FEATURES if feature.facts == HABIT]


def claim_progress(progress: "Progress") -> None:
    """Give each feature what it remembered in a state. Raises TypeError for what belongs to none."""
    for feature in FEATURES:
        if feature.progress is not None:
            progress.of(feature.progress)
    if progress.unclaimed:
        raise TypeError(f"its progress has {', '.join(sorted(progress.unclaimed))}, which nothing here reads")


def file_values(options: OptionsOfRun, progress: "Progress") -> dict[str, Any]:
    """Return the entries of features in the metadata of a file that is saved now."""
    values: dict[str, Any] = {}
    for feature in active_features(options):
        if feature.metadata is not None:
            entries = feature.metadata(options.of(feature.options), progress)
            values |= {f"ss_{name}": value for name, value in entries.items()}
    return values


def result_rows(options: OptionsOfRun, progress: "Progress") -> list[tuple[str, str]]:
    """Return the lines of features in the box at the end of a run."""
    features = active_features(options)
    return [feature.result(progress) for feature in features if feature.result is not None]


def bad_step_remedies() -> str:
    """Return what features can do about a loss or norm that is NaN or infinite, as sentences."""
    return " ".join(feature.remedy_of_bad_step for feature in FEATURES if feature.remedy_of_bad_step)


def install_features(options: OptionsOfRun) -> Hooks:
    """Return the hooks of a run, with the functions of its features."""
    hooks = Hooks()
    for feature in active_features(options):
        if feature.install is not None:
            feature.install(hooks)
    return hooks
