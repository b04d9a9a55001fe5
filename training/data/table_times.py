"""Noise levels of each dataset table: keys of a table replace the options of the same names.

A micro-batch has items of one group of tables (one table, or the subsets of a dataset), and each group has
one distribution of timesteps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dataset.table import DatasetTable
from dataset.timestep_keys import SHIFT_KEY, TIMESTEP_KEYS
from modules.errors import DatasetError, OptionError
from protocols.family import Family, NoiseSpec
from protocols.rules import ONE_EXPERT, Expert
from training.data.timesteps import can_reach_expert, check_experts_reached
from training.noise_options import NUM_TIMESTEPS, TimestepOptions


def list_training_tables(tables: Sequence[DatasetTable]) -> list[DatasetTable]:
    """Return the tables that are trained on: all except those for validation."""
    return [table for table in tables if not table.learning.validation]


def make_table_timestep_options(options: TimestepOptions, table: DatasetTable) -> TimestepOptions:
    """Return the timestep options for the items of a table: the run's, replaced by keys of the table.

    Raises:
        DatasetError: If keys of the table and options contradict each other.
    """
    if not table.learning.has_own_timesteps:
        return options
    low = options.min_timestep if table.learning.min_timestep is None else table.learning.min_timestep
    high = options.max_timestep if table.learning.max_timestep is None else table.learning.max_timestep
    flow_shift = (
        options.flow_shift
        if table.learning.discrete_flow_shift is None
        else table.learning.discrete_flow_shift
    )
    has_window = table.learning.min_timestep is not None or table.learning.max_timestep is not None
    if has_window and options.timestep_focus is not None:
        raise DatasetError(
            f"{table.name}: {_describe_table_keys(table)} with --timestep_focus {options.timestep_focus:g}: "
            "a window leaves levels out, while a focus draws from all of them, but some more often. Omit "
            "one of the two"
        )
    if has_window and low is not None and high is not None and low >= high:
        raise DatasetError(
            f"{table.name}: its levels would be --min_timestep {low} --max_timestep {high}, one of them from "
            "the training options, and nothing lies between them. Set both keys in the table"
        )
    return replace(options, min_timestep=low, max_timestep=high, flow_shift=flow_shift)


def timestep_options_by_group(
    options: TimestepOptions, tables: Sequence[DatasetTable]
) -> Mapping[int, TimestepOptions]:
    """Return the timestep options of each group of tables that share batches, by `DatasetTable.batch_group`.

    Empty if no table has timestep options of its own.
    """
    trained = list_training_tables(tables)
    if not any(table.learning.has_own_timesteps for table in trained):
        return {}
    return {table.batch_group: make_table_timestep_options(options, table) for table in trained}


def list_timestep_options(options: TimestepOptions, tables: Sequence[DatasetTable]) -> list[TimestepOptions]:
    """Return all distinct timestep options: one for each group of tables, or just the run's `options`."""
    return [*dict.fromkeys(timestep_options_by_group(options, tables).values())] or [options]


def group_tables_by_timesteps(
    options: TimestepOptions, tables: Sequence[DatasetTable]
) -> Mapping[TimestepOptions, Sequence[DatasetTable]]:
    """Group the trained tables by their timestep options; empty if no table has its own."""
    grouped: dict[TimestepOptions, list[DatasetTable]] = {}
    if timestep_options_by_group(options, tables):
        for table in list_training_tables(tables):
            grouped.setdefault(make_table_timestep_options(options, table), []).append(table)
    return grouped


def check_timesteps(options: TimestepOptions, tables: Sequence[DatasetTable], family: Family) -> None:
    """Raise DatasetError or OptionError if the noise levels of a table or option cannot be trained."""
    noise_spec, experts = family.noise, family.experts
    for table in list_training_tables(tables):
        if table.learning.has_own_timesteps:
            _check_table(options, table, noise_spec, experts)
    options_by_table = list_timestep_options(options, tables)
    if options.timestep_focus is not None:
        low, high = options.timestep_focus_range
        lowest = min(expert.min_timestep for expert in experts)
        if high <= lowest:
            raise OptionError(
                f"--timestep_focus_range {low} {high}: only levels from {lowest:g} on are trained (the "
                f"{experts[0].description}). Pass a range above that, such as {lowest:g} {NUM_TIMESTEPS}"
            )
    if len(experts) > 1 or experts[0].min_timestep > 0:
        check_experts_reached(options_by_table, noise_spec, experts)


def _check_table(
    options: TimestepOptions, table: DatasetTable, noise_spec: NoiseSpec, experts: Sequence[Expert]
) -> None:
    """Raise DatasetError if a table's shift has no effect, or no expert is trained within its timesteps."""
    sampler = options.timestep_sampling
    if table.learning.discrete_flow_shift is not None and not takes_shift(options, noise_spec):
        reason = "has no shift"
        if options.follows_size:
            reason = "takes its shift from the size of each item"
        raise DatasetError(
            f"{table.name}: {SHIFT_KEY} = {table.learning.discrete_flow_shift:g}: "
            f"--timestep_sampling {sampler} {reason}. Omit the key, or use --timestep_sampling shift"
        )
    table_options = make_table_timestep_options(options, table)
    if any(can_reach_expert(table_options, noise_spec, expert) for expert in experts):
        return
    if tuple(experts) == ONE_EXPERT:
        raise DatasetError(
            f"{table.name}: {_describe_table_keys(table)}: --timestep_sampling {sampler} draws no level "
            "there. Widen the window, or omit --preserve_distribution_shape"
        )
    lowest = min(expert.min_timestep for expert in experts)
    raise DatasetError(
        f"{table.name}: {_describe_table_keys(table)}: only levels from {lowest:g} on are trained (the "
        f"{experts[0].description}), and this table has none of them. Widen its window, omit the table, "
        "or train both transformers"
    )


def takes_shift(options: TimestepOptions, noise_spec: NoiseSpec) -> bool:
    """Return whether --discrete_flow_shift affects the drawn timesteps."""
    sampler = options.timestep_sampling
    return sampler == "shift" or (sampler == "sigma" and noise_spec.table_is_shifted)


def _describe_table_keys(table: DatasetTable) -> str:
    values = {name: table.value_of(name) for name in TIMESTEP_KEYS}
    return " and ".join(f"{name} = {value:g}" for name, value in values.items() if value is not None)


def describe_times(options: TimestepOptions, tables: Sequence[DatasetTable]) -> list[str]:
    """Return one line about the noise levels of each trained table; [] if no table sets its own."""
    lines = []
    for times, grouped in group_tables_by_timesteps(options, tables).items():
        text = f"{times.lowest} to {times.highest}"
        if times.timestep_sampling == "sigma" and times.has_window:
            text += " counted from the noisy end"
        if times.flow_shift != options.flow_shift:
            text += f", shift {times.flow_shift:g}"
        lines += [f"{table.label}: {text}" for table in grouped]
    return sorted(lines)


def explain_ignored_options(
    options: TimestepOptions, tables: Sequence[DatasetTable], validates_between: bool = False
) -> dict[str, str]:
    """Return the timestep options that have no effect in a run, each with the reason.

    Args:
        options: Options of the run.
        tables: Tables of the dataset.
        validates_between: Whether the run measures a validation loss between --min_timestep and
            --max_timestep.
    """
    training_tables = list_training_tables(tables)
    reasons: dict[str, str] = {}
    # a validation uses --min_timestep and --max_timestep even if each trained table has its own bounds
    ignorable_keys = (SHIFT_KEY,) if validates_between else TIMESTEP_KEYS
    for name in ignorable_keys:
        if training_tables and all(table.value_of(name) is not None for table in training_tables):
            reasons[name] = "each table of the dataset has its own"
    if not any(times.has_window for times in list_timestep_options(options, tables)):
        reasons["preserve_distribution_shape"] = "neither --min_timestep nor --max_timestep is set"
    return reasons
