"""Preview a run without training: --show_timesteps, --debug_dataset, --check and --plan."""

import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from contract.family import FLOW, Family, NoiseSpec, sound_of
from contract.rules import ONE_EXPERT, Expert
from dataset.batches.checks import SameEncoders, check_channels
from dataset.batches.finding import find_items, require_items
from dataset.batches.items import CachingCommands
from dataset.batches.order import split_validation
from dataset.caching.prefetch import conclude
from dataset.config import DatasetConfig
from dataset.options import DebugOptions
from dataset.table import DatasetTable
from modules.atomic_write import write_bytes
from modules.console import count_of
from modules.control_codes import escape_control_codes, shorten
from modules.devices import choose_device
from modules.errors import OptionError
from modules.seeds import derive_seed
from running.planning.device_memory import room_on
from training.caching_inside import TablePlan, find_live_texts, list_live_tables, open_stores, plan_tables
from training.checks import judge_rate
from training.data.feed import BatchSources
from training.data.live import LiveTexts
from training.data.table_times import describe_times, group_tables
from training.data.timesteps import Timesteps, draw, loss_weights
from training.features.composing import check_model, check_texts, describe_targets
from training.loss import NoisyBatch
from training.noise_options import NOTHING, NUM_TIMESTEPS, WEIGHTS_OF_LOSS, TimestepOptions
from training.options import TrainingOptions
from training.other_families import NO_OTHERS, OtherFamilies
from training.plan import read_config
from training.planning.memory import plan_one_card, read_largest

# of --debug_dataset: windows, or files where there are none
DEBUG_VIEW = DebugOptions(debug_mode="image", console_width=80, console_back=None, console_num_images=None)


def show_preview(
    family: Family, options: TrainingOptions, commands: CachingCommands, others: OtherFamilies = NO_OTHERS
) -> int:
    """Show the preview that the options ask for instead of training; returns the exit code.

    commands: commands to show if caches are missing. others: models besides the trained one.
    """
    if options.timesteps.show_timesteps is not None:
        folder = options.saving.output_dir or Path()
        timesteps = options.timesteps
        if options.weighted_by == NOTHING and timesteps.weighting_scheme in WEIGHTS_OF_LOSS:
            timesteps = replace(timesteps, weighting_scheme="none")
        show_timesteps(
            timesteps,
            options.loop.seed or 0,
            folder=folder,
            noise=family.noise,
            experts=family.experts,
            tables=_tables_of(family, options),
        )
        return 0
    if options.subset is not None and options.subset.debug_dataset:
        from data_tools.report.views import show_datasets  # only with --debug_dataset

        config = read_config(options, family)
        conclude(show_datasets(family, config, DEBUG_VIEW, max(1, os.cpu_count() or 1)))
        return 0
    if options.loop.check:
        return _check(family, options, commands)
    if os.environ.get("RANK", "0") == "0":  # only one process prints
        _plan(family, options, commands, others)
    return 0


def _tables_of(family: Family, options: TrainingOptions) -> Sequence[DatasetTable]:
    """Return the tables of the dataset; nothing if none is given."""
    is_of_folders = options.subset is not None and options.subset.replaces_toml
    if options.loop.dataset_config is None and not is_of_folders:
        return ()
    return read_config(options, family).datasets


def _check(family: Family, options: TrainingOptions, commands: CachingCommands) -> int:
    """Print the items that would be trained on, and write the page (--check); returns the exit code."""
    from data_tools.report import check, findings  # only with --check

    workers = max(1, os.cpu_count() or 1)
    config = read_config(options, family)
    counters = findings.load_counters(family.text_encoders)
    texts = find_live_texts(family, options, config)
    check_texts(options, texts)
    check_model(options, family, lambda: family.block_counts() if family.dit_files else ())
    plans = plan_tables(family, config, options.caching, () if texts is None else texts.keys)
    seed = options.validation.validation_seed
    if seed is None:
        seed = options.loop.seed or 0
    validation = options.validation.validation_split, seed
    if all(plan.is_own for plan in plans):
        result = check.check_training(
            config,
            family.cache_tag,
            family.latent,
            commands,
            accumulation=options.loop.gradient_accumulation_steps,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            files=[f"{name}: {value}" for name, value in family.metadata.items() if name != "resolution"],
            text_keys=family.text_keys,
            counters=counters,
            sound=sound_of(family),
            validation=validation,
        )
    else:  # some are yet to be encoded by the training itself
        result = check.check_caching(
            family,
            config,
            workers=workers,
            skip_existing=False,
            parts=[check.MEDIA],
            validation=validation,
            counters=counters,
        )
        lines = [*_describe_plans(plans), *counters.missing]
        result = replace(result, head=("Where the training has them:", *findings.indent(lines)))
    lines = describe_run(options, num_validation=result.num_held)
    times = describe_times(options.timesteps, config.datasets)
    targets = describe_targets(options)
    if targets:
        lines = ["Targets:", *findings.indent(targets), *lines]
    if times:
        lines = ["Timesteps of the tables:", *findings.indent(times), *lines]
    result = replace(result, tail=(*result.tail, *lines))
    code: int = check.print_check(result, family, config, page=options.loop.page, workers=workers)
    return code


def _describe_plans(plans: Sequence[TablePlan]) -> list[str]:
    """Return a line for each table: where the training has its latents and texts from."""
    lines = []
    for plan in plans:
        latents = f"latents are {plan.latents.value}"
        texts = f"embeddings of captions {plan.texts.value}"
        lines.append(f"{plan.table.name}: {latents}, {texts}")
    return lines


def describe_run(options: TrainingOptions, num_validation: int) -> list[str]:
    """Return lines of --check about a run's validation and its learning rate.

    num_validation: how many items it has.
    """
    lines = []
    if num_validation:
        most = options.validation.max_validation_steps
        measured = num_validation if most is None else min(num_validation, most)
        limit = "" if most is None else f" (--max_validation_steps {most})"
        lines.append(f"Each validation measures {count_of(measured, 'batch')} of one item{limit}")
    rate = judge_rate(options)
    if "HIGH" in rate or "LOW" in rate:
        lines.append(f"Learning rate: {rate}")
    return lines


def _plan(family: Family, options: TrainingOptions, commands: CachingCommands, others: OtherFamilies) -> None:
    """Print how much memory the run would need (--plan)."""
    family.check_given_files()  # first: caches are made with them
    config = read_config(options, family)
    texts = find_live_texts(family, options, config)
    check_texts(options, texts)
    check_model(options, family, family.block_counts)
    noisy_batch = _read_for_plan(family, options, commands, config=config, texts=texts)
    sample_files: Sequence[Path] = ()
    if others.sampling is not None and options.samples.are_made:
        sample_files = others.sampling.dit_files
    device = choose_device(None)
    sampled = len({*sample_files} - {*family.dit_files})
    cards, size = options.speed.plan.cards
    room = room_on(device, size)
    if cards == 1:
        plan_one_card(
            family,
            options,
            noisy_batch,
            device=device,
            room=room,
            sampled=sampled,
            texts=texts,
        )
        return
    from training.planning.several_cards import plan_ways  # only with several cards

    assert room is not None  # its size is given
    plan_ways(
        family,
        options,
        noisy_batch,
        device=device,
        cards=cards,
        room=room,
        sampled=sampled,
        texts=texts,
    )


def _read_for_plan(
    family: Family,
    options: TrainingOptions,
    commands: CachingCommands,
    config: DatasetConfig,
    texts: LiveTexts | None,
) -> NoisyBatch:
    """Read the largest batch of the training. Raises OptionError if it is not in caches on disk."""
    plans = plan_tables(family, config, options.caching, () if texts is None else texts.keys)
    if not all(plan.can_be_planned for plan in plans):
        raise OptionError(
            "--plan rehearses a batch from caches on disk, and this training makes others: make them first, "
            f"with --cache_latents_to_disk and --cache_text_encoder_outputs_to_disk, or with\n  "
            f"{commands.latents}\n  {commands.text}"
        )
    stores = open_stores(family, plans)
    tables = list_live_tables(family.cache_tag, plans, needs_captions=texts is not None)
    listed = find_items(
        config,
        family.cache_tag,
        family.latent,
        text_keys=family.text_keys,
        stores=stores,
        live=tables,
        sound=sound_of(family),
    )
    items = require_items(listed, commands)
    check_channels(items, family.latent, commands, stores)
    training, _ = split_validation(items, options.validation.validation_split)
    sources = BatchSources(family.latent, SameEncoders(commands), stores=stores, tables=tables)
    return read_largest(family, options, training or items, sources)


TITLE_LENGTH = 100  # characters above a diagram
SHOWN_LATENTS = (1, 16, 1, 128, 128)  # of a picture of 1024 x 1024 pixels


def show_timesteps(
    options: TimestepOptions,
    seed: int = 0,
    folder: Path = Path(),
    noise: NoiseSpec = FLOW,
    experts: Sequence[Expert] = ONE_EXPERT,
    tables: Sequence[DatasetTable] = (),
) -> None:
    """Print the distribution of timesteps and the loss weights, or draw both into `folder`/timesteps.png.

    tables: of the dataset. If some have timesteps of their own, each different distribution is shown.
    Raises OutputError if the picture cannot be written.
    """
    by_label = {"": options}
    grouped = group_tables(options, tables)
    if grouped:
        by_label = {", ".join(table.name for table in group): times for times, group in grouped.items()}
    drawn: dict[str, Tensor] = {}
    shares: dict[str, str] = {}
    for label, times in by_label.items():
        counts, weights = timestep_statistics(times, seed, noise=noise, experts=experts)
        drawn[label] = counts
        shares[label] = shares_in_words(counts, experts)
    if options.show_timesteps == "console":
        for label, counts in drawn.items():
            title = f"{label}: timesteps drawn" if label else "timesteps drawn"
            sys.stdout.write(escape_control_codes(f"{title}\n{bars(counts)}\n{shares[label]}"))
        sys.stdout.write(f"loss weights\n{bars(weights)}\n")
        return
    path = folder / "timesteps.png"
    write_bytes(path, draw_statistics(drawn, weights, [expert.lowest for expert in experts]))
    what = f"timesteps drawn (above) and loss weights (below), from 0 at the left to {NUM_TIMESTEPS}"
    lines = [f"{path}: {what}\n"]
    for label, text in shares.items():
        lines += [f"{label}:\n{text}" if label and text else text]
    sys.stdout.write(escape_control_codes("".join(lines)))


def shares_in_words(counts: Tensor, experts: Sequence[Expert]) -> str:
    """Return a line for each expert that says how many of the draws it gets; empty for a model with one."""
    if experts[0] == ONE_EXPERT[0]:
        return ""
    lines = []
    for expert in experts:
        end = min(expert.highest, NUM_TIMESTEPS)
        share = float(counts[math.ceil(expert.lowest) : math.ceil(end)].sum() / counts.sum())
        lines.append(
            f"{expert.words}: timesteps from {expert.lowest:g} to {end:g}, {share:.1%} of the draws\n"
        )
    return "".join(lines)


def timestep_statistics(
    options: TimestepOptions,
    seed: int,
    num_batches: int = 100,
    batch_size: int = 1000,
    noise: NoiseSpec = FLOW,
    experts: Sequence[Expert] = ONE_EXPERT,
) -> tuple[Tensor, Tensor]:
    """Return the number of draws of each of 1000 timesteps, and the loss weight of each."""
    counts = torch.zeros(NUM_TIMESTEPS, dtype=torch.float64)
    # all batches together have this distribution, whichever expert each of them goes to
    lowest_expert = [min(experts, key=lambda expert: expert.lowest)]
    for number in range(num_batches):
        times = draw(
            options,
            batch_size,
            torch.Generator().manual_seed(derive_seed(seed, "shown timesteps", number)),
            seed=seed,
            first_sample=number * batch_size,
            noise=noise,
            shape=SHOWN_LATENTS,
            experts=lowest_expert,
        )
        shares = times.timesteps / NUM_TIMESTEPS if noise.table else times.levels
        # float32 holds 0.7 as 0.69999999
        index = (shares.double() * NUM_TIMESTEPS + 1e-4).long().clamp(0, NUM_TIMESTEPS - 1)
        counts += torch.bincount(index, minlength=NUM_TIMESTEPS)
    timesteps = torch.arange(NUM_TIMESTEPS).float()
    levels = timesteps / NUM_TIMESTEPS
    return counts, loss_weights(options, Timesteps(levels, timesteps, levels)).double()


def bars(values: Tensor, lines: int = 40, width: int = 64) -> str:
    """Return text with a bar for the mean of each of `lines` equal runs, the longest `width` characters."""
    means = values.double().view(lines, -1).mean(1)
    step = len(values) // lines
    scale = width / max(float(means.max()), 1e-12)
    return "\n".join(
        f"{i * step:4d}..{(i + 1) * step - 1:4d} {mean:10.2f} {'#' * round(mean * scale)}"
        for i, mean in enumerate(means.tolist())
    )


def draw_statistics(drawn: Mapping[str, Tensor], weights: Tensor, boundaries: Sequence[float] = ()) -> bytes:
    """Return a PNG: how many of the draws fall on each timestep, and the loss weight of each.

    drawn: counts of the draws, by the tables that they are of; "" for all tables. boundaries: timesteps at
    which an expert begins; those above 0 are marked.
    """
    import matplotlib  # slow to import, and only this needs it
    from matplotlib.figure import Figure  # likewise

    matplotlib.rcdefaults()  # without the matplotlibrc of the working folder: it may be somebody else's
    rows = []
    for title, counts in drawn.items():
        shares = 100 * counts / counts.sum()
        by_tens = shares.view(-1, 10).sum(1).repeat_interleave(10)
        rows.append((by_tens, "% of the draws, per 10 timesteps", shorten(title, TITLE_LENGTH)))
    rows.append((weights, "loss weight", ""))
    figure = Figure(figsize=(10, 3.5 * len(rows)), layout="constrained")
    for axes, (values, label, title) in zip(figure.subplots(len(rows), 1, sharex=True), rows, strict=True):
        axes.set_title(title)
        axes.fill_between(range(NUM_TIMESTEPS), values.tolist(), step="mid", alpha=0.7)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        for boundary in boundaries:
            if boundary > 0:
                axes.axvline(boundary, linestyle="--", color="black", linewidth=1)
    axes.set_xlabel("timestep: 0 is clean, 1000 pure noise")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
