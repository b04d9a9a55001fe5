"""Train networks of a checkpoint that also contains text encoders and VAE, and write whole checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import Parameter

from checkpoints.shards import SavedForm
from modules.errors import OptionError
from protocols.family import Described, DitSpec, LearningEncoder, get_part_rates
from protocols.full_model import DIT, LearningParts, TrainsCheckpoint, trains_checkpoint
from training.data.live import LiveTextEncoders
from training.options import TrainingOptions
from training.trainable import Trainable, WrittenFile, learns_by_name, prepare_dit, reject_no_match


def prepare_full_model(
    family: Described,
    options: TrainingOptions,
    dit: nn.Module,
    live_encoders: LiveTextEncoders | None,
    writes: bool = True,
) -> Trainable:
    """Train all or selected weights of the transformer, and of the text encoders that are trained.

    Args:
        family: The model family.
        options: Options of the run.
        dit: The transformer.
        live_encoders: The loaded text encoders.
        writes: Whether files will be written; if so, the original checkpoint is opened.

    Raises:
        OptionError: If no weight is trained.
    """
    assert options.full_dit is not None
    rate, name_parts = options.optimizer.learning_rate, options.full_dit.name_parts
    shard_bytes = options.full_dit.shard_bytes
    if not trains_checkpoint(family):
        return prepare_dit(dit, rate, name_parts, get_part_rates(family), SavedForm(shard_bytes))
    as_folder = options.full_dit.saves_folders if writes else None
    return _train_checkpoint(
        family,
        dit,
        live_encoders,
        learning_rate=rate,
        name_parts=name_parts,
        as_folder=as_folder,
        shard_bytes=shard_bytes,
    )


@dataclass
class _OptimizerGroups:
    """Parameter groups for the optimizer, collected by the names that they have in the logs."""

    params: dict[str, list[Parameter]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, rate: float, parameter: Parameter) -> None:
        """Add a weight to the group `name` with learning rate `rate`, or freeze it if the rate is 0."""
        parameter.requires_grad_(rate != 0)
        if rate != 0:
            self.params.setdefault(name, []).append(parameter)
            self.rates[name] = rate

    def list(self) -> list[dict[str, Any]]:
        return [{"params": self.params[name], "lr": self.rates[name]} for name in self.params]


def _train_checkpoint(
    family: TrainsCheckpoint,
    dit: nn.Module,
    live_encoders: LiveTextEncoders | None,
    *,
    learning_rate: float,
    name_parts: Sequence[str],
    as_folder: bool | None,
    shard_bytes: int,
) -> Trainable:
    """Train each part of a checkpoint at the rate of `family.learning_parts`."""
    # 1. Group the transformer's weights by part; weights with the rate 0 stay frozen.
    # 2. Add the weights of text encoders that are trained.
    # 3. Choose the writer of the file or folder, and the step at which the text encoders are frozen.
    parts = family.learning_parts
    groups = _OptimizerGroups()
    networks: dict[str, nn.Module] = {}
    for name, parameter in dit.named_parameters():
        group, rate = _select_rate(name, parts, family.dit, learning_rate)
        groups.add(group, rate if learns_by_name(name, name_parts) else 0.0, parameter)  # 0: stays frozen
    if groups.params:
        networks[DIT] = dit
    elif name_parts:
        reject_no_match(dit, name_parts)
    if live_encoders is not None:
        for encoder in live_encoders.learning_encoders:
            networks[encoder.name] = encoder.network
            _add_encoder_weights(groups, family, encoder, learning_rate)
    if not groups.params:
        rate_owner = "a part" if parts.have_own_rates else "--learning_rate"
        raise OptionError(
            f"nothing is trained: all learning rates are 0. Pass a rate above 0 to {rate_owner}"
        )
    written_files: dict[str, WrittenFile] = {}
    if as_folder is not None:
        written_files[""] = WrittenFile(family.checkpoint_writer(networks, as_folder, shard_bytes).write)
    freeze_at_step: Mapping[str, int] = {}
    if parts.text_steps is not None:
        freeze_at_step = dict.fromkeys(networks.keys() - {DIT}, parts.text_steps)
    return Trainable(
        modules=networks,
        groups=groups.list(),
        group_names=tuple(groups.params),
        written_files=written_files,
        freeze_at_step=freeze_at_step,
    )


def _add_encoder_weights(
    groups: _OptimizerGroups, family: TrainsCheckpoint, encoder: LearningEncoder, learning_rate: float
) -> None:
    """Add the weights of a text encoder to the optimizer's groups, at its own rate or at `learning_rate`."""
    rate = family.learning_parts.text_encoder_rates[encoder.name]
    if rate is None:
        rate = learning_rate
    for name, parameter in encoder.network.named_parameters():
        # weights that the model does not use, such as layers after the last one it reads, stay frozen
        is_used = family.reads_weight(encoder.name, name)
        groups.add(encoder.name, rate if is_used else 0.0, parameter)


def _select_rate(name: str, parts: LearningParts, spec: DitSpec, default_rate: float) -> tuple[str, float]:
    """Return the name of the parameter group and the learning rate for a transformer weight."""
    if not parts.blocks:
        return DIT, default_rate
    assert spec.block_numbering is not None  # the family has rates of blocks
    number = spec.block_numbering.number_of(name)
    assert number is not None  # all blocks have numbers
    return f"{DIT} block {number}", parts.blocks[number]
