"""What the phases of a run ask all features for. Standard library only."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import OptionError
from modules.options import Options, facts_of, find_reach, option
from training.features import FEATURES
from training.features.contract import AT_NETWORK, Feature, StepPasses, T

if TYPE_CHECKING:
    from contract.family import Family
    from contract.rules import Expert
    from dataset.batches.items import TrainingItem
    from dataset.table import DatasetTable
    from running.ways.contract import FurtherModel
    from training.data.feed import BatchSources
    from training.data.live import LiveTexts
    from training.features.hooks import Hooks, LearningPass, MergedLoras, OptionsOfRun, PlannedRun, RunEnd
    from training.loss import NoisyBatch
    from training.other_families import OtherFamilies
    from training.reports.page import PageParts
    from training.saving.files import Publisher
    from training.steps import Progress


logger = logging.getLogger(__name__)

NO_FACTS: Mapping[str, Mapping[str, Any]] = {}


def options_at(place: str) -> type[Options]:
    """Return a record with the options of the features of a place: a field for each, by its name."""
    features = [feature for feature in FEATURES if feature.place == place]
    return _join_records(
        {feature.name: feature.options for feature in features},
        {feature.name: feature.facts for feature in features},
    )


def _join_records(
    records: Mapping[str, type[Options] | None], facts: Mapping[str, Mapping[str, Any]] = NO_FACTS
) -> type[Options]:
    """Return a record with a field for each of these records, with its facts; None is left out."""
    kinds = {name: kind for name, kind in records.items() if kind is not None}
    content: dict[str, Any] = {name: option(facts=facts.get(name)) for name in kinds}
    content["__annotations__"] = kinds
    return type("FeatureOptions", (Options,), content)


def find_record(records: tuple[Options, ...], kind: type[T]) -> T:
    """Return the options of a feature among what `options_at` returned."""
    values = [getattr(record, field.name) for record in records for field in fields(record)]
    return next(value for value in values if isinstance(value, kind))


def active_features(options: "OptionsOfRun") -> list[Feature]:
    return [feature for feature in FEATURES if feature.is_on(options.of(feature.options))]


def _functions(
    options: "OptionsOfRun", of: Callable[[Feature], Callable[..., T] | None]
) -> list[Callable[..., T]]:
    """Return a function of each active feature that has it, with the feature's own options given."""
    pairs = [(of(feature), options.of(feature.options)) for feature in active_features(options)]
    return [partial(function, own_options) for function, own_options in pairs if function is not None]


def refuse_combinations(options: "OptionsOfRun") -> None:
    """Raise OptionError for options that a feature does not go with."""
    targets = _functions(options, lambda feature: feature.target if feature.replaces_clip else None)
    if len(targets) > 1:
        raise OptionError(
            f"{targets[0]()} and {targets[1]()} are two answers to one question: what to learn in place of "
            "the clip. Leave out one of the two"
        )
    for feature in active_features(options):
        if feature.refuse is not None:
            feature.refuse(options)


def find_show(
    options: "OptionsOfRun",
) -> "Callable[[OptionsOfRun, Family, Callable[[], Sequence[DatasetTable]]], None] | None":
    """Return what a feature shows in place of a training, see `Feature.show`; None if there is a training."""
    return next((feature.show for feature in active_features(options) if feature.show is not None), None)


def check_start(options: "OptionsOfRun") -> None:
    """Raise UserError for a package or file that a feature needs and that is missing."""
    for check in _functions(options, lambda feature: feature.check_start):
        check()


def options_reaching(*reaches: str) -> dict[str, Mapping[str, Any]]:
    """Return the facts of the options of features that reach out of the program in these ways, by name."""
    of_features: dict[str, Mapping[str, Any]] = {}
    for feature in FEATURES:
        of_features |= facts_of(feature.options)
    return {name: facts for name, facts in of_features.items() if find_reach(facts) in reaches}


def options_by_expert() -> list[type[Options]]:
    """Return the records of features for the second of two transformers."""
    return [feature.options_by_expert for feature in FEATURES if feature.options_by_expert is not None]


def refused_for_whole() -> dict[str, str]:
    """Return the reasons why whole models refuse the options of a network's features, by option."""
    return {
        name: feature.why_not_whole
        for feature in FEATURES
        if feature.place == AT_NETWORK
        for name in facts_of(feature.options)
    }


def merged_loras(options: "OptionsOfRun", expert: "Expert") -> "MergedLoras":
    """Read what a feature has merged into a transformer while it is loaded."""
    from training.features.hooks import MergedLoras  # only in a run

    read = [merge(expert) for merge in _functions(options, lambda feature: feature.merged)]
    return next(iter(read), MergedLoras())


def may_undo_distillation(options: "OptionsOfRun") -> bool:
    """Return whether what is merged may undo that a transformer was distilled for few steps."""
    return any(undoes() for undoes in _functions(options, lambda feature: feature.undoes_distillation))


def own_habits(options: "OptionsOfRun") -> dict[str, Any]:
    """Return further settings of features, on or off, that a resumed run may change."""
    habits: dict[str, Any] = {}
    for feature in FEATURES:
        if feature.habits is not None:
            habits |= feature.habits(options.of(feature.options))
    return habits


def options_of_run() -> type[Options]:
    """Return a record with the options of features that `run` has too."""
    return _join_records({feature.name: feature.options_of_run for feature in FEATURES})


def kept_average(options: "OptionsOfRun") -> str:
    """Return the short name of the average of the weights that a run keeps; "": it keeps none."""
    return next((feature.average for feature in active_features(options) if feature.average), "")


def sampled_average(options: "OptionsOfRun") -> str:
    """Return the short name of the average that samples show; "": they show the weights themselves."""
    for feature in active_features(options):
        if feature.samples_average is not None and feature.samples_average(options.of(feature.options)):
            return feature.average
    return ""


def make_publisher(options: "OptionsOfRun") -> "Publisher | None":
    """Return what passes on the saved files of a run, if a feature does."""
    made = [make() for make in _functions(options, lambda feature: feature.publisher)]
    return next(filter(None, made), None)


def fetch_state(options: "OptionsOfRun", name: str, folder: Path) -> Path | None:
    """Return the state that --resume names if a feature fetches it, else None. folder: to write it into."""
    fetched = [fetch(name, folder) for fetch in _functions(options, lambda feature: feature.fetch_state)]
    return next(filter(None, fetched), None)


def change_model(options: "OptionsOfRun", family: "Family") -> "Family":
    """Return the model of a run, as its features change it. Raises OptionError for one that they cannot."""
    for feature in active_features(options):
        if feature.model is not None:
            family = feature.model(options, family)
    return family


def check_model(options: "OptionsOfRun", family: "Family", count_blocks: Callable[[], Sequence[int]]) -> None:
    """Raise OptionError for a model that a feature does not go with.

    count_blocks: returns the numbers of blocks of each list; none: not known.
    """
    for check in _functions(options, lambda feature: feature.check):
        check(family, count_blocks())


def check_files(options: "OptionsOfRun", family: "Family", others: "OtherFamilies") -> None:
    """Raise UserError for files that a feature cannot use. others: models besides the trained one."""
    for feature in active_features(options):
        if feature.check_files is not None:
            feature.check_files(options, family, others)


def options_of_blocks() -> list[str]:
    """Return the options that need the blocks of a transformer."""
    return [name for feature in FEATURES for name in feature.of_blocks]


def typed_targets(options: "OptionsOfRun") -> list[str]:
    """Return the options of features that ask for a target besides the clip, as they are typed."""
    return [describe() for describe in _functions(options, lambda feature: feature.target)]


def keep_steps(options: "OptionsOfRun") -> bool:
    """Return whether what is learned towards keeps that a transformer was distilled for few steps."""
    return any(keeps() for keeps in _functions(options, lambda feature: feature.keeps_steps))


def need(options: "OptionsOfRun", part: str) -> bool:
    """Return whether batches have a further part, as `Feature.needs` has it."""
    return any(part in feature.needs for feature in active_features(options))


def join_streams(options: "OptionsOfRun") -> bool:
    """Return whether passes have one loss of picture and sound."""
    return any(feature.joins_streams for feature in active_features(options))


def find_view(options: "OptionsOfRun") -> str:
    """Return the further conditions that passes of a feature see, as `Batch.view`; "" if there are none."""
    return next(filter(None, (find() for find in _functions(options, lambda feature: feature.view))), "")


def further_models(options: "OptionsOfRun") -> list["FurtherModel"]:
    """Return the frozen transformers that features load besides that of the run."""
    models = [find() for find in _functions(options, lambda feature: feature.further_model)]
    return [model for model in models if model is not None]


def count_passes(options: "OptionsOfRun") -> StepPasses:
    """Return the passes of a micro-batch. Raises OptionError for a file of them with faults."""
    passes = StepPasses()
    for count in _functions(options, lambda feature: feature.passes):
        passes = passes.plus(count())
    return passes


def check_tables(options: "OptionsOfRun", tables: "Sequence[DatasetTable]") -> None:
    """Raise OptionError for keys of tables that a feature reads and that do not go with the options; warn of
    attributes that none reads.
    """
    for feature in active_features(options):
        if feature.check_tables is not None:
            feature.check_tables(options, tables)
    known = {name for feature in FEATURES for name in feature.attributes}
    for table in tables:
        for name in sorted(table.attributes - known):
            logger.warning("%s: custom_attributes.%s is ignored: nothing reads it", table.name, name)


def need_base(options: "OptionsOfRun", tables: "Sequence[DatasetTable]") -> bool:
    """Return whether batches of the tables may need the model without the network."""
    return any(
        feature.needs_base is not None and feature.needs_base(tables) for feature in active_features(options)
    )


def check_texts(options: "OptionsOfRun", texts: "LiveTexts | None") -> None:
    """Raise OptionError for text encoders that a feature cannot use. texts: at work while training."""
    for check in _functions(options, lambda feature: feature.check_texts):
        check(texts)


def check_items(options: "OptionsOfRun", items: "Sequence[TrainingItem]", sources: "BatchSources") -> None:
    """Raise UserError for items to learn that a feature cannot use. sources: where they are read from."""
    for check in _functions(options, lambda feature: feature.check_items):
        check(items, sources)


def note_unused(options: "OptionsOfRun", items: "Sequence[TrainingItem]") -> None:
    """Log which parts of the items to learn are for features alone that are off."""
    for feature in FEATURES:
        if feature.note_unused is not None and not feature.is_on(options.of(feature.options)):
            feature.note_unused(items)


def describe_targets(options: "OptionsOfRun") -> list[str]:
    """Return a line for each target of a run and one on its passes, then those of other features."""
    lines = _functions(options, lambda feature: feature.describe if feature.passes else None)
    further = _functions(options, lambda feature: None if feature.passes else feature.describe)
    passes = count_passes(options)
    told = [] if passes == StepPasses() else [f"passes in a step: {passes.words}"]
    return [*(describe() for describe in lines), *told, *(describe() for describe in further)]


def rehearsed_passes(options: "OptionsOfRun", noisy_batch: "NoisyBatch") -> "list[LearningPass]":
    """Return each feature's context around the passes with gradients, as a measurement of memory needs it.

    noisy_batch: on the CPU.
    """
    return [rehearse(noisy_batch) for rehearse in _functions(options, lambda feature: feature.rehearse)]


def usual_habits() -> list[Options]:
    """Return the usual options of all features: states of before there was one do not say that it was off."""
    return [feature.options.usual() for feature in FEATURES]


def claim_progress(progress: "Progress") -> None:
    """Give each feature what it remembered in a state. Raises TypeError for what belongs to none."""
    for feature in FEATURES:
        if feature.progress is not None:
            progress.of(feature.progress)
    if progress.unclaimed:
        raise TypeError(f"its progress has {', '.join(sorted(progress.unclaimed))}, which nothing here reads")


def file_values(options: "OptionsOfRun", progress: "Progress") -> dict[str, Any]:
    """Return the entries of features in the metadata of a file that is saved now."""
    values: dict[str, Any] = {}
    for feature in FEATURES:
        own_options = options.of(feature.options)
        is_recorded = feature.is_on(own_options) or (feature.images_record_it and options.is_for_images)
        if feature.metadata is not None and is_recorded:
            entries = feature.metadata(own_options, progress)
            values |= {f"ss_{name}": value for name, value in entries.items()}
    return values


def start_rows(options: "OptionsOfRun") -> list[tuple[str, str]]:
    """Return the lines of features that end the box at the start of a run."""
    return [make_row() for make_row in _functions(options, lambda feature: feature.start_row)]


def result_rows(options: "OptionsOfRun", progress: "Progress") -> list[tuple[str, str]]:
    """Return the lines of features in the box at the end of a run."""
    return [feature.result(progress) for feature in active_features(options) if feature.result is not None]


def commands_at_end(options: "OptionsOfRun") -> list[tuple[str, Sequence[str]]]:
    """Return the commands of features that may follow a finished run, in words, with their headings."""
    commands = [make() for make in _functions(options, lambda feature: feature.command_at_end)]
    return [command for command in commands if command is not None]


def bad_step_remedies() -> str:
    """Return the remedies of features for a loss or norm that is NaN or infinite, as sentences."""
    return " ".join(feature.remedy_of_bad_step for feature in FEATURES if feature.remedy_of_bad_step)


def parts_of_page() -> "PageParts":
    """Return what features add to the page of a run."""
    from training.reports.page import PageParts  # not for --help

    return PageParts(
        charts=[feature.charts for feature in FEATURES if feature.charts is not None],
        tiles=[feature.tile for feature in FEATURES if feature.tile is not None],
    )


def install_features(options: "OptionsOfRun", progress: "Progress") -> "Hooks":
    """Return the hooks of a run, with the functions of its features."""
    from training.features.hooks import Hooks  # only in a run

    hooks = Hooks()
    for feature in active_features(options):
        if feature.install is not None:
            feature.install(hooks, options, progress)
    return hooks


def prepare_features(plan: "PlannedRun") -> "Hooks":
    """Return the hooks of a run, once its features have done what comes before networks are loaded."""
    hooks = install_features(plan.options, plan.progress)
    for prepare in hooks.before_load:
        prepare(plan)
    return hooks


@contextlib.contextmanager
def end_of_run(options: "OptionsOfRun") -> "Iterator[RunEnd]":
    """Have features act when the block ends. What is known of the run is noted in what this yields."""
    from training.features.hooks import RunEnd  # only in a run

    end = RunEnd(options, total_steps=options.loop.known_steps)
    try:
        yield end
    except BaseException as error:
        act_at_end(end, error)
        raise
    act_at_end(end, None)


def act_at_end(end: "RunEnd", error: BaseException | None) -> None:
    """Have features act on the end of a run, once. error: that has ended it."""
    if not end.is_due:
        return
    end.is_due = False
    end.error = error
    for feature in active_features(end.options):
        if feature.at_end is not None:
            feature.at_end(end)
