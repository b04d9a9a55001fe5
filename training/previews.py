"""Preview a run without training: --show_timesteps, --debug_dataset, --check and --plan."""

import os
from dataclasses import replace
from pathlib import Path

from dataset.batches.finding import CachingCommands, find_items, require_items
from dataset.batches.latent_space import check_channels
from dataset.batches.validation_split import split_validation
from dataset.caching.reports import conclude
from dataset.options import DebugOptions
from modules.contract.family import Family
from modules.devices import choose_device
from modules.errors import OptionError
from modules.installation import import_own
from training.caching_inside import TextUse, list_live_tables, open_stores, plan_tables
from training.data.live_media import BatchSources
from training.data.options import WEIGHTS_OF_LOSS
from training.data.shown_timesteps import show_timesteps
from training.live_choice import find_live_texts, text_use
from training.loss_options import NOTHING
from training.options import TrainingOptions
from training.plan import read_config
from training.planning.memory import plan_training

# of --debug_dataset: windows, or files where there are none
DEBUG_VIEW = DebugOptions(debug_mode="image", console_width=80, console_back=None, console_num_images=None)


def show_preview(
    family: Family, options: TrainingOptions, commands: CachingCommands, sampling: Family | None = None
) -> int | None:
    """Show the preview that the options ask for instead of training; returns the exit code, or None to train.

    commands: commands to show if caches are missing. sampling: the model of samples, if it has transformers
    that are not trained.
    """
    if options.timesteps.show_timesteps is not None:
        folder = options.saving.output_dir or Path()
        timesteps = options.timesteps
        if options.weighted_by == NOTHING and timesteps.weighting_scheme in WEIGHTS_OF_LOSS:
            timesteps = replace(timesteps, weighting_scheme="none")
        show_timesteps(timesteps, options.loop.seed or 0, folder, family.noise, family.experts)
        return 0
    if options.subset is not None and options.subset.debug_dataset:
        views, workers = import_own("data_tools.report.views"), max(1, os.cpu_count() or 1)
        conclude(views.show_datasets(family, read_config(options), DEBUG_VIEW, workers))
        return 0
    if options.loop.check:
        return _check(family, options, commands)
    if options.speed.plan.is_asked:
        _plan(family, options, commands, sampling)
        return 0
    return None


def _check(family: Family, options: TrainingOptions, commands: CachingCommands) -> int:
    """Print the items that would be trained on, and write the page (--check); returns the exit code."""
    checks, findings = import_own("data_tools.report.check"), import_own("data_tools.report.findings")
    config, workers = read_config(options), max(1, os.cpu_count() or 1)
    counters = findings.load_counters(family.text_encoders)
    use = text_use(family, find_live_texts(family, options, config))
    plans = plan_tables(family, config, options.caching, use)
    if all(plan.is_own for plan in plans):
        result = checks.check_training(
            config,
            family.cache_tag,
            family.latent,
            commands,
            options.loop.gradient_accumulation_steps,
            int(os.environ.get("WORLD_SIZE", "1")),
            [f"{name}: {value}" for name, value in family.metadata.items()],
            family.text_keys,
            counters,
        )
    else:  # some are yet to be encoded by the training itself
        result = checks.check_caching(family, config, workers, False, parts=[checks.MEDIA])
        places = [
            f"{plan.table.name}: latents are {plan.latents.value}, embeddings of captions {plan.texts.value}"
            for plan in plans
        ]
        head = ("Where the training has them:", *findings.indent(places))
        result = replace(result, head=head, counters=counters)
    code: int = checks.tell_check(result, family, config, options.loop.page, workers)
    return code


def _plan(
    family: Family, options: TrainingOptions, commands: CachingCommands, sampling: Family | None
) -> None:
    """Print how much memory the run would need (--plan)."""
    family.check_given_files()  # first: caches are made with them
    config = read_config(options)
    texts = find_live_texts(family, options, config)
    use = text_use(family, texts)
    plans = plan_tables(family, config, options.caching, use)
    if not all(plan.can_be_planned for plan in plans):
        raise OptionError(
            "--plan rehearses a batch from caches on disk, and this training makes others: make them first, "
            f"with --cache_latents_to_disk and --cache_text_encoder_outputs_to_disk, or with\n  "
            f"{commands.latents}\n  {commands.text}"
        )
    stores = open_stores(family, plans)
    parts = family.cache_tag, family.latent, family.text_keys
    tables = list_live_tables(plans, needs_captions=use is not TextUse.CACHES)
    found = require_items(find_items(config, *parts, stores, tables), commands)
    check_channels(found, family.latent, commands, stores)
    items, _ = split_validation(found, options.validation.validation_split)
    samples = options.samples
    makes_samples = samples.sample_prompts is not None and (samples.is_timed or samples.sample_now)
    sampled = len(sampling.experts) - len(family.experts) if sampling is not None and makes_samples else 0
    sources = BatchSources(stores, tables)
    plan_training(family, options, items or found, commands, choose_device(None), sampled, sources, texts)
