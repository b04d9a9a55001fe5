"""Count the timesteps that a run would draw, and print or draw their distribution and the loss weights."""

import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataset.table import DatasetTable
from modules.atomic_write import write_bytes
from modules.control_codes import escape_control_codes, shorten
from modules.seeds import derive_seed
from protocols.family import FLOW, NoiseSpec
from protocols.rules import ONE_EXPERT, Expert
from training.data.table_times import group_tables_by_timesteps
from training.data.timesteps import Timesteps, draw, loss_weights
from training.noise_options import NUM_TIMESTEPS, TimestepOptions

TITLE_LENGTH = 100  # characters above a diagram
SHOWN_LATENTS = (1, 16, 1, 128, 128)  # shape for an image of 1024 x 1024 pixels, B C F H W


def show_timesteps(
    options: TimestepOptions,
    kind: str,
    seed: int = 0,
    folder: Path = Path(),
    noise_spec: NoiseSpec = FLOW,
    experts: Sequence[Expert] = ONE_EXPERT,
    tables: Sequence[DatasetTable] = (),
    uses_loss_weights: bool = True,
) -> None:
    """Print the distribution of timesteps and the loss weights, or draw both into `folder`/timesteps.png.

    Args:
        options: Options of the timesteps.
        kind: "console" to print, "image" to draw.
        seed: Seed of the run.
        folder: Folder for the image.
        noise_spec: How the family numbers its timesteps.
        experts: Experts of the model.
        tables: Tables of the dataset. If some have their own timesteps, each different distribution is shown.
        uses_loss_weights: Whether the run weights the loss by its noise level.

    Raises:
        OutputError: If the image cannot be written.
    """
    counts_by_label: dict[str, Tensor] = {}
    fractions_by_label: dict[str, str] = {}
    for label, group_options in _label_options(options, tables).items():
        counts, weights = count_timesteps(group_options, seed, noise_spec=noise_spec, experts=experts)
        counts_by_label[label] = counts
        fractions_by_label[label] = describe_fractions(counts, experts)
    if not uses_loss_weights:
        weights = torch.ones_like(weights)
    if kind == "console":
        _print_statistics(counts_by_label, fractions_by_label, weights)
        return
    path = folder / "timesteps.png"
    write_bytes(path, draw_statistics(counts_by_label, weights, [expert.min_timestep for expert in experts]))
    legend = f"timesteps drawn (above) and loss weights (below), from 0 at the left to {NUM_TIMESTEPS}"
    lines = [f"{path}: {legend}\n"]
    for label, text in fractions_by_label.items():
        lines += [f"{label}:\n{text}" if label and text else text]
    sys.stdout.write(escape_control_codes("".join(lines)))


def _label_options(options: TimestepOptions, tables: Sequence[DatasetTable]) -> dict[str, TimestepOptions]:
    """Return different timestep options by the names of their tables; by "" if all tables have the run's."""
    tables_by_options = group_tables_by_timesteps(options, tables)
    if not tables_by_options:
        return {"": options}
    labeled = {}
    for group_options, group in tables_by_options.items():
        label = ", ".join(table.name for table in group)
        labeled[label] = group_options
    return labeled


def _print_statistics(
    counts_by_label: Mapping[str, Tensor], fractions_by_label: Mapping[str, str], weights: Tensor
) -> None:
    """Print bar charts of the drawn timesteps of each label (group of tables), and of the loss weights."""
    for label, counts in counts_by_label.items():
        title = f"{label}: timesteps drawn" if label else "timesteps drawn"
        text = f"{title}\n{draw_text_bars(counts)}\n{fractions_by_label[label]}"
        sys.stdout.write(escape_control_codes(text))
    sys.stdout.write(f"loss weights\n{draw_text_bars(weights)}\n")


def describe_fractions(counts: Tensor, experts: Sequence[Expert]) -> str:
    """Return a line for each expert with its fraction of the draws; empty for a model with one expert."""
    if experts[0] == ONE_EXPERT[0]:
        return ""
    lines = []
    for expert in experts:
        end = min(expert.max_timestep, NUM_TIMESTEPS)
        share = float(counts[math.ceil(expert.min_timestep) : math.ceil(end)].sum() / counts.sum())
        lines.append(
            f"{expert.description}: timesteps from {expert.min_timestep:g} to {end:g}, {share:.1%} of the "
            "draws\n"
        )
    return "".join(lines)


def count_timesteps(
    options: TimestepOptions,
    seed: int,
    num_batches: int = 100,
    batch_size: int = 1000,
    noise_spec: NoiseSpec = FLOW,
    experts: Sequence[Expert] = ONE_EXPERT,
) -> tuple[Tensor, Tensor]:
    """Return the number of draws at each of 1000 timesteps, and the loss weight of each timestep."""
    counts = torch.zeros(NUM_TIMESTEPS, dtype=torch.float64)
    # with several experts, `draw` gives a whole batch to one of them; with the lowest alone, it draws from
    # the levels of all
    lowest_expert = [min(experts, key=lambda expert: expert.min_timestep)]
    for number in range(num_batches):
        times = draw(
            options,
            batch_size,
            torch.Generator().manual_seed(derive_seed(seed, "shown timesteps", number)),
            seed=seed,
            first_sample=number * batch_size,
            noise_spec=noise_spec,
            shape=SHOWN_LATENTS,
            experts=lowest_expert,
        )
        # for a model with a table of noise levels, a timestep is an index into the table
        fractions = times.timesteps / NUM_TIMESTEPS if noise_spec.table else times.levels
        # in float32, 0.7 is 0.69999999
        index = (fractions.double() * NUM_TIMESTEPS + 1e-4).long().clamp(0, NUM_TIMESTEPS - 1)
        counts += torch.bincount(index, minlength=NUM_TIMESTEPS)
    timesteps = torch.arange(NUM_TIMESTEPS).float()
    levels = timesteps / NUM_TIMESTEPS
    return counts, loss_weights(options, Timesteps(levels, timesteps, levels)).double()


def draw_text_bars(values: Tensor, lines: int = 40, width: int = 64) -> str:
    """Draw a bar chart as text: a bar for the mean of each of `lines` ranges, at most `width` long."""
    means = values.double().view(lines, -1).mean(1)
    step = len(values) // lines
    scale = width / max(float(means.max()), 1e-12)
    return "\n".join(
        f"{i * step:4d}..{(i + 1) * step - 1:4d} {mean:10.2f} {'#' * round(mean * scale)}"
        for i, mean in enumerate(means.tolist())
    )


def draw_statistics(
    counts_by_label: Mapping[str, Tensor], weights: Tensor, boundaries: Sequence[float] = ()
) -> bytes:
    """Return a PNG with a chart of the drawn timesteps for each group of tables, and one of the loss weights.

    Args:
        counts_by_label: Number of draws of each timestep, by the title of the chart.
        weights: Loss weight of each timestep.
        boundaries: Timesteps at which an expert begins; those above 0 are marked.
    """
    import matplotlib  # slow to import, and only this needs it
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # ignore the matplotlibrc of the working folder, which may be someone else's
    diagrams = []
    for title, counts in counts_by_label.items():
        fractions = 100 * counts / counts.sum()
        # sums over ten timesteps each, drawn as steps
        by_tens = fractions.view(-1, 10).sum(1).repeat_interleave(10)
        diagrams.append((by_tens, "% of the draws, per 10 timesteps", shorten(title, TITLE_LENGTH)))
    diagrams.append((weights, "loss weight", ""))
    figure = Figure(figsize=(10, 3.5 * len(diagrams)), layout="constrained")
    all_axes = figure.subplots(len(diagrams), 1, sharex=True)
    for axes, (values, label, title) in zip(all_axes, diagrams, strict=True):
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
