"""Show what a run would do, without training: --show_timesteps, --debug_dataset, --check and --plan."""

import os
import sys
from pathlib import Path

from dataset.batches.finding import CachingCommands, find_items, require_items
from dataset.batches.latent_space import check_channels
from dataset.batches.validation_split import split_validation
from dataset.caching.reports import conclude
from dataset.check import check_training
from dataset.checking.captions import load_counters
from dataset.checking.page import write_check_page
from dataset.debug_views import show_datasets
from dataset.options import DebugOptions
from modules.contract.family import Family
from modules.control_codes import escape_control_codes
from modules.devices import choose_device
from training.data.shown_timesteps import show_timesteps
from training.job import read_config
from training.options import TrainingOptions
from training.planning.memory import plan_training

# of --debug_dataset: windows, or files where there are none
DEBUG_VIEW = DebugOptions(debug_mode="image", console_width=80, console_back=None, console_num_images=None)


def show_preview(
    family: Family, options: TrainingOptions, commands: CachingCommands, sampling: Family | None = None
) -> int | None:
    """Show what the options ask for instead of a training; returns the exit code, or None to train.

    commands: what to type if caches are missing. sampling: the model of samples, if it has transformers that
    are not trained.
    """
    if options.timesteps.show_timesteps is not None:
        folder = options.saving.output_dir or Path()
        show_timesteps(options.timesteps, options.loop.seed or 0, folder, family.noise, family.experts)
        return 0
    if options.subset is not None and options.subset.debug_dataset:
        conclude(show_datasets(family, read_config(options), DEBUG_VIEW, max(1, os.cpu_count() or 1)))
        return 0
    if options.loop.check:
        return _check(family, options, commands)
    if options.speed.plan.is_asked:
        _plan(family, options, commands, sampling)
        return 0
    return None


def _check(family: Family, options: TrainingOptions, commands: CachingCommands) -> int:
    """Print what would be trained on (--check)."""
    config = read_config(options)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    files = [f"{name}: {value}" for name, value in family.metadata.items()]
    accumulation = options.loop.gradient_accumulation_steps
    counters = load_counters(family.text_encoders)
    result = check_training(
        config,
        family.cache_tag,
        family.latent,
        commands,
        accumulation,
        processes,
        files,
        family.text_keys,
        counters,
    )
    sys.stdout.write(escape_control_codes("\n".join(result.lines)) + "\n")
    page, workers = options.loop.page, max(1, os.cpu_count() or 1)
    if page.html is not None:
        write_check_page(
            page.html, config, result, counters, family.latent, family.defaults.fps, page.html_items, workers
        )
    return result.exit_code


def _plan(
    family: Family, options: TrainingOptions, commands: CachingCommands, sampling: Family | None
) -> None:
    """Print how much memory the run would need (--plan)."""
    family.check_given_files()  # first: caches are made with them
    found = require_items(
        find_items(read_config(options), family.cache_tag, family.latent, family.text_keys), commands
    )
    check_channels(found, family.latent, commands)
    items, _ = split_validation(found, options.validation.validation_split)
    samples = options.samples
    makes_samples = samples.sample_prompts is not None and (samples.is_timed or samples.sample_now)
    sampled = len(sampling.experts) - len(family.experts) if sampling is not None and makes_samples else 0
    plan_training(family, options, items or found, commands, choose_device(None), sampled)
