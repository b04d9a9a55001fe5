"""Wrap layers that stay in 8 or 4 bits with LoRAs, and all layers if the noise level masks ranks.

All other LoRAs are merged.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as functional
from torch import nn

from modules.errors import CheckpointError
from networks.apply import Change, LoraPatch
from networks.gated_loras import ChangedParameter, LoraBranch, LoraWrapper, find_parameters
from networks.kinds.contract import named
from networks.loading import WeightedLora
from networks.rank_masks import read_rank_rule


def add_unmerged(
    dit: nn.Module, changes: Mapping[str, Sequence[Change]], device: torch.device, dtype: torch.dtype
) -> None:
    """Wrap layers with quantized weights so that LoRAs are added to their outputs.

    Call it before a network is attached and before compilation.

    Args:
        dit: The transformer.
        changes: Changes by weight, from `LoraPatch.unmerged`.
        device: Device of the run.
        dtype: Dtype to compute in.
    """
    for name, weight_changes in changes.items():
        parameter = ChangedParameter(name, dit.get_submodule(name.removesuffix(".weight")))
        branches = [_make_branch(dit, parameter, change) for change in weight_changes]
        layer = LoraWrapper(parameter, branches)
        layer.attach()
        layer.switch_on(device, dtype)


def _make_branch(dit: nn.Module, parameter: ChangedParameter, change: Change) -> LoraBranch:
    """Return a LoRA's addition to the output of a layer, limited to the rows that it changes."""
    branch = LoraBranch(parameter, change.delta, change.weighted_lora.multiplier)
    branch.mask_ranks(dit, change.weighted_lora.lora.metadata)
    # a rotation uses all inputs, and selects its output rows itself
    if branch.rotation is not None:
        branch.output_rows = change.row_slice
    elif change.row_slice is not None:  # only some of the outputs change: pad the others with zeros
        padding = (change.row_slice.start, len(parameter.unpacked) - change.row_slice.stop)
        branch.apply_region = partial(functional.pad, pad=padding)
    return branch


def split_masked(weighted_loras: Iterable[WeightedLora]) -> tuple[list[WeightedLora], list[WeightedLora]]:
    """Return (LoRAs that can be merged into weights, LoRAs trained with a rank mask by T-LoRA)."""
    plain: list[WeightedLora] = []
    masked: list[WeightedLora] = []
    for weighted_lora in weighted_loras:
        if read_rank_rule(weighted_lora.lora.metadata) is None:
            plain.append(weighted_lora)
        else:
            masked.append(weighted_lora)
    return plain, masked


def masked_changes(dit: nn.Module, weighted_loras: Sequence[WeightedLora]) -> Mapping[str, Sequence[Change]]:
    """Return the changes that T-LoRAs make to a loaded network, for `add_unmerged`; warn of missing modules.

    Raises:
        CheckpointError: If a file does not fit, or if it changes more than the weights of layers.
    """
    patch = LoraPatch(weighted_loras, is_masked=True)
    for parameter in find_parameters(dit).values():
        name = parameter.path
        if not patch.changes_parameter(name):
            continue
        if not parameter.adds_to_output or not patch.leave_unmerged(name, tuple(parameter.unpacked.shape)):
            rule = read_rank_rule(weighted_loras[0].lora.metadata)
            assert rule is not None  # otherwise it would be merged
            raise CheckpointError(
                f"{weighted_loras[0].lora.path} is {named(rule.kind)} according to its metadata, but has "
                f"more for {name} than the two factors of a layer, which rank masks do not support.\n  Pass "
                "the file as the training wrote it.",
                weighted_loras[0].lora.path,
            )
    patch.check()  # raises or warns if the model lacks modules
    return patch.unmerged  # filled by `leave_unmerged` above
