"""Preview a run without training: --debug_dataset, --check, --plan, and what features show."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dataset.batches.checks import SameEncoders, check_channels
from dataset.batches.finding import find_items, require_items
from dataset.batches.items import CachingCommands
from dataset.batches.order import split_validation
from dataset.caching.prefetch import conclude
from dataset.config import DatasetConfig
from dataset.options import DebugOptions
from dataset.sources.media_source import Fault
from dataset.table import DatasetTable
from modules.console import format_count
from modules.devices import select_device
from modules.errors import DatasetError, OptionError
from protocols.family import Family, get_audio_spec
from runtime.offload.joining import launched_processes
from runtime.planning.device_memory import device_memory_to_plan
from runtime.ways.composing import count_groups
from training.caching_inside import (
    TablePlan,
    TensorLocation,
    find_live_encoders,
    list_on_the_fly_tables,
    open_stores,
    plan_tables,
)
from training.checks import describe_learning_rate, reject_foreign_module, reject_quantized_bases
from training.data.feed import BatchSources
from training.data.live import LiveTextEncoders
from training.data.table_times import describe_times
from training.experts import describe_few_steps
from training.features.composing import begin_run
from training.features.hooks import RunFeatures
from training.learner import NetworkSpec, ReadCaptions
from training.loss import NoisyBatch
from training.options import TrainingOptions
from training.other_models import NO_OTHERS, OtherFamilies
from training.plan import check_optimizer, read_config
from training.planning.memory import plan_one_card, read_largest

if TYPE_CHECKING:  # only with --check
    from data_tools.report.findings import CheckResult, TableFindings, TokenCounters

WITHOUT_WORD = "word to learn is not in all captions"
# for --debug_dataset: show windows, or write files if there is no display
DEBUG_VIEW = DebugOptions(debug_mode="image", console_width=80, console_back=None, console_num_images=None)


def show_preview(
    family: Family,
    options: TrainingOptions,
    network_spec: NetworkSpec,
    commands: CachingCommands,
    others: OtherFamilies = NO_OTHERS,
) -> int:
    """Show the preview that the options ask for instead of training; returns the exit code.

    Args:
        family: The model family.
        options: Options of the run.
        network_spec: Description of what the run would train: a kind of network, or the whole DiT.
        commands: Commands to show if caches are missing.
        others: Models in addition to the trained one.
    """
    show = options.features.show  # set by a feature that shows something instead of training
    if show is not None:
        show(options, family, partial(_list_tables, family, options, network_spec))
        return 0
    if options.subset is not None and options.subset.debug_dataset:
        from data_tools.report.views import show_datasets  # only with --debug_dataset

        config = read_config(options, family, network_spec)
        conclude(show_datasets(family, config, DEBUG_VIEW, max(1, os.cpu_count() or 1)))
        return 0
    if options.loop.check:
        return _print_check(family, options, network_spec, commands)
    if os.environ.get("RANK", "0") == "0":  # only one process prints
        _print_plan(family, options, network_spec, commands=commands, others=others)
    return 0


def _list_tables(
    family: Family, options: TrainingOptions, network_spec: NetworkSpec
) -> Sequence[DatasetTable]:
    """Return the tables of the dataset file; () if no file is given."""
    uses_folders = options.subset is not None and options.subset.replaces_toml
    if options.loop.dataset_config is None and not uses_folders:
        return ()
    return read_config(options, family, network_spec).datasets


def _print_check(
    family: Family, options: TrainingOptions, network_spec: NetworkSpec, commands: CachingCommands
) -> int:
    """Print the items that would be trained on, and write the page (--check); returns the exit code."""
    # 1. Check the options and features with this dataset.
    # 2. Find the faults of the dataset, from its caches or files.
    # 3. Add lines about timesteps, targets and the learning rate.
    from data_tools.report import check, findings  # only with --check

    reject_foreign_module(family, options)
    workers = max(1, os.cpu_count() or 1)
    # check the options and features with this dataset
    check_optimizer(options)
    config = read_config(options, family, network_spec)
    counters = findings.load_token_counters(family.text_encoders)
    live_encoders = find_live_encoders(family, options, config)
    features = begin_run(options, family, config.datasets)
    # only features ask for the depth, and without them no transformer has to be named; (): unknown
    block_counts = family.block_counts() if features.on.check and family.dit_files else ()
    _check_features(features, family, live_encoders, block_counts)
    custom = network_spec.custom
    if custom is not None:
        custom.check()
    # find the faults of the dataset
    live_keys = () if live_encoders is None else live_encoders.keys
    plans = plan_tables(family, config, options.caching, live_keys, needs=features.needs)
    result = _check_dataset(family, options, config, plans, commands, counters=counters, workers=workers)
    caption_checks = [*features.caption_checks]
    if custom is not None and custom.reads_captions:
        caption_checks.append(custom.check_captions)
    for read in caption_checks:
        _note_captions_without_word(read, result.tables)
    if options.samples.sample_prompts is not None or any(
        plan.texts in {TensorLocation.MEMORY, TensorLocation.LIVE} for plan in plans
    ):
        result.tables[0].errors += counters.find_offline_errors(counters.offline_errors)
    # add lines about the run
    lines = [
        *_describe_each("Timesteps of the tables:", describe_times(options.timesteps, config.datasets)),
        *_describe_each("Targets:", features.describe_targets()),
        *describe_run(options, network_spec=network_spec, num_validation=result.num_held_back),
    ]
    if family.has_dit_files:
        lines += filter(None, [describe_few_steps(family, options)])
    result = replace(result, tail=(*result.tail, *lines))
    code: int = check.print_check(result, family, config, page=options.loop.page, workers=workers)
    return code


def _check_features(
    features: RunFeatures,
    family: Family,
    live_encoders: LiveTextEncoders | None,
    block_counts: Sequence[int],
) -> None:
    """Raise OptionError if a feature does not support the text encoders or the transformer of this run."""
    for check_texts in features.on.on_text_encoders:
        check_texts(live_encoders)
    for check_model in features.on.check:
        check_model(family, block_counts)


def _check_dataset(
    family: Family,
    options: TrainingOptions,
    config: DatasetConfig,
    plans: Sequence[TablePlan],
    commands: CachingCommands,
    *,
    counters: "TokenCounters",
    workers: int,
) -> "CheckResult":
    """Return the items and faults of the dataset, from its caches or, without these, from its files."""
    from data_tools.report import check, findings  # only with --check

    seed = options.validation.validation_seed
    if seed is None:
        seed = options.loop.seed or 0
    validation = options.validation.validation_split, seed
    if all(plan.reads_cache_files for plan in plans):  # the caches were made before the training
        num_processes = launched_processes()
        return check.check_training(
            config,
            family.cache_tag,
            family.latent,
            commands,
            accumulation=options.loop.gradient_accumulation_steps,
            # one process alone checks a run of one group, which is launched later
            data_parallel_size=count_groups(options.speed, num_processes) if num_processes > 1 else 1,
            checkpoint_lines=[
                f"{name}: {value}" for name, value in family.metadata.items() if name != "resolution"
            ],
            text_keys=family.text_keys,
            counters=counters,
            audio=get_audio_spec(family),
            validation=validation,
        )
    # the training itself will encode some of the caches
    result = check.check_caching(
        family,
        config,
        workers=workers,
        skip_existing=False,
        parts=[check.MEDIA],
        validation=validation,
        counters=counters,
    )
    # where each table has its latents and text encoder outputs
    described = []
    for table_plan in plans:
        latents = f"latents are {table_plan.latents.value}"
        texts = f"embeddings of captions {table_plan.texts.value}"
        described.append(f"{table_plan.table.name}: {latents}, {texts}")
    lines = [*described, *counters.missing_lines]
    return replace(result, head=("Where the training has them:", *findings.indent(lines)))


def _describe_each(title: str, lines: Sequence[str]) -> list[str]:
    """Return the title followed by the indented lines; an empty list if there are no lines."""
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _note_captions_without_word(read: ReadCaptions, tables: "Sequence[TableFindings]") -> None:
    """Add a note to the findings of the first table if captions of any table lack the new word."""
    from training.token_captions import check_source_captions  # only to learn a word

    try:
        remark = check_source_captions(read, [(findings.table, findings.sources) for findings in tables])
    except DatasetError as error:
        tables[0].add_table_error(error)
        return
    if remark:
        tables[0].warnings.append(Fault(WITHOUT_WORD, remark))


def describe_run(options: TrainingOptions, network_spec: NetworkSpec, num_validation: int) -> list[str]:
    """Return lines of --check about a run's validation and its learning rate.

    Args:
        options: Options of the run.
        network_spec: Description of what the run trains, with its usual learning rates.
        num_validation: Number of items for validation.
    """
    lines = []
    if num_validation:
        max_steps = options.validation.max_validation_steps
        num_measured = num_validation if max_steps is None else min(num_validation, max_steps)
        limit = "" if max_steps is None else f" (--max_validation_steps {max_steps})"
        lines.append(f"Each validation measures {format_count(num_measured, 'batch')} of one item{limit}")
    rate = describe_learning_rate(options, network_spec)
    is_unusual = "HIGH" in rate or "LOW" in rate  # as `describe_learning_rate` writes
    if is_unusual:
        lines.append(f"Learning rate: {rate}")
    return lines


def _print_plan(
    family: Family,
    options: TrainingOptions,
    network_spec: NetworkSpec,
    *,
    commands: CachingCommands,
    others: OtherFamilies,
) -> None:
    """Print how much memory the run would need (--plan), on one GPU or divided over several."""
    # 1. Check the network module, the optimizer, the model files and the features.
    # 2. Read the largest batch from the caches.
    # 3. Simulate a step with it, and print the memory.
    reject_foreign_module(family, options)
    check_optimizer(options)
    family.check_named_files()  # first: caches are made with them
    if options.full_dit is not None:
        reject_quantized_bases(family)
    config = read_config(options, family, network_spec)
    live_encoders = find_live_encoders(family, options, config)
    _check_features(options.features, family, live_encoders, family.block_counts())
    noisy_batch = _read_largest_batch(family, options, commands, config=config, live_encoders=live_encoders)
    device = select_device(None)
    num_gpus, size = options.speed.plan.cards
    room = device_memory_to_plan(device, size)
    if num_gpus == 1:
        plan_one_card(
            family,
            options,
            noisy_batch,
            device=device,
            room=room,
            sampling=others.sampling,
            live_encoders=live_encoders,
            tables=config.datasets,
        )
        return
    from training.planning.several_cards import plan_several_cards  # only with several GPUs

    assert room is not None  # its size is given
    plan_several_cards(
        family,
        options,
        noisy_batch,
        device=device,
        num_gpus=num_gpus,
        room=room,
        sampling=others.sampling,
        live_encoders=live_encoders,
        tables=config.datasets,
    )


def _require_caches_on_disk(
    plans: Sequence[TablePlan], commands: CachingCommands, live_encoders: LiveTextEncoders | None
) -> None:
    """Raise OptionError if a table's latents or text encoder outputs are not in files, as --plan requires."""
    if any(plan.latents is TensorLocation.LIVE for plan in plans):
        raise OptionError(
            "--plan rehearses a batch from caches, and images of this training are encoded at each step. "
            "Plan without what changes them; the VAE then takes memory too"
        )
    if all(plan.can_be_planned for plan in plans):
        return
    switches = "--cache_latents_to_disk and --cache_text_encoder_outputs_to_disk"
    scripts = f"{commands.latents}\n  {commands.text}"
    if live_encoders is not None and live_encoders.trained_encoders:  # their outputs cannot be cached
        switches = "--cache_latents_to_disk"
        scripts = commands.latents
    raise OptionError(
        "--plan rehearses a batch from caches on disk, which this training does not have yet: make them "
        f"first, with {switches}, or with\n  {scripts}"
    )


def _read_largest_batch(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands,
    config: DatasetConfig,
    live_encoders: LiveTextEncoders | None,
) -> NoisyBatch:
    """Read the largest batch of the run. Raises OptionError if it is not in caches on disk."""
    # text tensors that are encoded at each step, not cached
    live = () if live_encoders is None else live_encoders.keys
    plans = plan_tables(family, config, options.caching, live, needs=options.features.needs)
    _require_caches_on_disk(plans, commands, live_encoders)
    stores = open_stores(family, plans)
    tables = list_on_the_fly_tables(family.cache_tag, plans, needs_captions=live_encoders is not None)
    found_items = find_items(
        config,
        family.cache_tag,
        family.latent,
        text_keys=family.text_keys,
        stores=stores,
        on_the_fly_tables=tables,
        audio=get_audio_spec(family),
    )
    items = require_items(found_items, commands)
    check_channels(items, family.latent, commands, stores)
    # if all tables are marked `validation`, nothing is left for training: then take the largest of all items
    training, _ = split_validation(items, options.validation.validation_split)
    sources = BatchSources(family.latent, SameEncoders(commands), stores=stores, tables=tables)
    return read_largest(family, options, training or items, sources)
