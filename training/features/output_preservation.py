"""Let what the model makes of some captions stay as it is: diff_output_preservation of a table.

Samples of such a table are compared with the prediction of the model without the network, in validation too,
whatever other targets a run has: see `preserved_samples` in `training/targets/passes.py`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import Options
from training.features.contract import AT_NETWORK, Feature

if TYPE_CHECKING:
    from torch import Tensor

    from dataset.table import DatasetTable
    from training.features.hooks import OptionsOfRun
    from training.loss import NoisyBatch
    from training.targets.passes import TrainingPasses


class OutputPreservationOptions(Options):
    """No options: tables ask for it."""


def _are_preserved(tables: "Sequence[DatasetTable]") -> bool:
    return any(table.preserves_output for table in tables)


def _check_tables(options: "OptionsOfRun", tables: "Sequence[DatasetTable]") -> None:
    """Raise OptionError for a table with this key if there is no model without the network."""
    name = next((table.name for table in tables if table.preserves_output), None)
    if name is not None and options.whole_dit is not None:
        raise OptionError(
            f"{name}: diff_output_preservation compares a LoRA with the model without it, and here the model "
            "itself is trained. Leave it out"
        )


def preserve_output(passes: "TrainingPasses", noisy_batch: "NoisyBatch", velocity: "Tensor") -> "Tensor":
    """Return the velocity, for samples in `preserved` replaced by the base model's prediction.

    The model runs for every batch if processes have to run equal passes.
    """
    from training.targets.passes import choose  # torch: only in a training

    preserved = noisy_batch.batch.preserved
    if not (any(preserved) or passes.rule.always_as_base):
        return velocity
    base_output = passes.base(noisy_batch)
    return choose(preserved, base_output, velocity) if any(preserved) else velocity


OUTPUT_PRESERVATION = Feature(
    name="output_preservation",
    options=OutputPreservationOptions,
    place=AT_NETWORK,
    is_on=lambda options: True,
    check_tables=_check_tables,
    needs_base=_are_preserved,
    install=lambda hooks, options, progress: hooks.own_targets.append(preserve_output),
)
