"""Show the distribution of timesteps instead of training: --show_timesteps.

`show_timesteps_drawing.py` counts and draws it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modules.options import FREE, option
from training.features.contract import AT_NOISE, Feature, FeatureOptions
from training.features.hooks import RunFeatures, RunOptionsProtocol
from training.noise_options import NOTHING

if TYPE_CHECKING:
    from dataset.table import DatasetTable
    from protocols.family import Family


class ShowTimestepsOptions(FeatureOptions, title="timesteps and loss weights", at=AT_NOISE, facts=FREE):
    """Option to show the timestep distribution instead of training."""

    show_timesteps: str | None = option(
        "show the distribution of timesteps and weights, then exit", choices=("image", "console")
    )


def _show(
    options: RunOptionsProtocol, family: "Family", read_tables: "Callable[[], Sequence[DatasetTable]]"
) -> None:
    """Print or draw the distribution of timesteps."""
    from training.features.show_timesteps_drawing import show_timesteps  # torch: only instead of training

    kind = options.of(ShowTimestepsOptions).show_timesteps
    assert kind is not None  # the feature is on
    show_timesteps(
        options.timesteps,
        kind,
        seed=options.loop.seed or 0,
        folder=options.saving.output_dir or Path(),
        noise_spec=family.noise,
        experts=family.experts,
        tables=read_tables(),
        uses_loss_weights=options.weighted_by != NOTHING,
    )


def _join(run: RunFeatures, options: ShowTimestepsOptions) -> None:
    run.show = _show


SHOW_TIMESTEPS = Feature(
    name="show_timesteps",
    options=ShowTimestepsOptions,
    is_on=lambda options: options.show_timesteps is not None,
    join=_join,
)
