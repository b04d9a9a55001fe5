"""Show the timesteps that the options draw (--show_timesteps), in the console or as a picture."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.atomic_write import write_bytes
from modules.contract.family import FLOW, NoiseSpec
from modules.contract.rules import ONE_EXPERT, Expert
from modules.control_codes import escape_control_codes
from modules.seeds import derive_seed
from training.data.options import NUM_TIMESTEPS, TimestepOptions
from training.data.timesteps import Timesteps, draw, loss_weights, spans_of

SHOWN_LATENTS = (1, 16, 1, 128, 128)  # of a picture of 1024 x 1024 pixels


def show_timesteps(
    options: TimestepOptions,
    seed: int = 0,
    folder: Path = Path(),
    noise: NoiseSpec = FLOW,
    experts: Sequence[Expert] = ONE_EXPERT,
) -> None:
    """Print the distribution of timesteps and the loss weights, or draw both into `folder`/timesteps.png.

    Raises OutputError if the picture cannot be written.
    """
    counts, weights = timestep_statistics(options, seed, noise=noise, experts=experts)
    shares = shares_in_words(counts, experts)
    if options.show_timesteps == "console":
        sys.stdout.write(f"timesteps drawn\n{bars(counts)}\n{shares}loss weights\n{bars(weights)}\n")
        return
    path = folder / "timesteps.png"
    write_bytes(path, draw_statistics(counts, weights, [expert.lowest for expert in experts]))
    what = f"timesteps drawn (above) and loss weights (below), from 0 at the left to {NUM_TIMESTEPS}"
    sys.stdout.write(escape_control_codes(f"{path}: {what}\n{shares}"))


def shares_in_words(counts: Tensor, experts: Sequence[Expert]) -> str:
    """Return a line for each expert that says how many of the draws it gets; empty for a model with one."""
    if experts[0] == ONE_EXPERT[0]:
        return ""
    lines = []
    for expert, span in zip(experts, spans_of(experts), strict=True):
        share = float(counts[span.holds(torch.arange(NUM_TIMESTEPS))].sum() / counts.sum())
        end = min(span.highest, NUM_TIMESTEPS)
        lines.append(f"{expert.words}: timesteps from {span.lowest:g} to {end:g}, {share:.1%} of the draws\n")
    return "".join(lines)


def timestep_statistics(
    options: TimestepOptions,
    seed: int,
    num_batches: int = 100,
    batch_size: int = 1000,
    noise: NoiseSpec = FLOW,
    experts: Sequence[Expert] = ONE_EXPERT,
) -> tuple[Tensor, Tensor]:
    """How often each of 1000 timesteps is drawn, and the loss weight of each."""
    counts = torch.zeros(NUM_TIMESTEPS, dtype=torch.float64)
    # all batches together have this distribution, whichever expert each of them goes to
    whole = [min(experts, key=lambda expert: expert.lowest)]
    for number in range(num_batches):
        generator = torch.Generator().manual_seed(derive_seed(seed, "shown timesteps", number))
        first = number * batch_size
        times = draw(options, batch_size, generator, seed, first, noise, SHOWN_LATENTS, whole)
        shares = times.timesteps / NUM_TIMESTEPS if noise.table else times.sigmas
        # float32 holds 0.7 as 0.69999999
        index = (shares.double() * NUM_TIMESTEPS + 1e-4).long().clamp(0, NUM_TIMESTEPS - 1)
        counts += torch.bincount(index, minlength=NUM_TIMESTEPS)
    each = torch.arange(NUM_TIMESTEPS).float()
    return counts, loss_weights(options, Timesteps(each / NUM_TIMESTEPS, each)).double()


def bars(values: Tensor, lines: int = 40, width: int = 64) -> str:
    """Return text with a bar for the mean of each of `lines` equal runs, the longest `width` characters."""
    means = values.double().view(lines, -1).mean(1)
    step = len(values) // lines
    scale = width / max(float(means.max()), 1e-12)
    return "\n".join(
        f"{i * step:4d}..{(i + 1) * step - 1:4d} {mean:10.2f} {'#' * round(mean * scale)}"
        for i, mean in enumerate(means.tolist())
    )


def draw_statistics(counts: Tensor, weights: Tensor, boundaries: Sequence[float] = ()) -> bytes:
    """Return a PNG: how many of the draws fall on each timestep, and the loss weight of each.

    boundaries: timesteps at which an expert begins; those above 0 are marked.
    """
    from matplotlib.figure import Figure  # slow to import, and only this needs it

    figure = Figure(figsize=(10, 7), layout="constrained")
    shares = 100 * counts / counts.sum()
    rows = (
        (shares.view(-1, 10).sum(1).repeat_interleave(10), "% of the draws, per 10 timesteps"),
        (weights, "loss weight"),
    )
    for axes, (values, label) in zip(figure.subplots(2, 1, sharex=True), rows, strict=True):
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
