"""Merge full checkpoints of one model into their weighted sum, tensor by tensor."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.finite import check_finite
from checkpoints.kinds import is_lora
from checkpoints.opening import Checkpoint, open_checkpoint
from checkpoints.quantizing import dequantized_on_read
from checkpoints.writing import stream_tensors
from modules.console import format_count, format_size, list_some, pluralize, show_box
from modules.devices import select_device
from modules.errors import CheckpointError, OptionError
from modules.options import Options, not_needed, option
from protocols.loading import TensorInfo

logger = logging.getLogger(__name__)

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNET = "model.diffusion_model."
EMA_PREFIX = "model_ema."
# names of the first layer of a U-Net, in single files and in diffusers' folders
FIRST_LAYERS = ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight")
ROUNDED_SUM = 1e-4  # the sum of the ratios may differ from 1 by this much: 0.33333 0.33333 0.33333
_STALE = ("sshs_", "modelspec.hash_sha256")  # hashes of the first model


class MergeModelsOptions(Options, title="what to do"):
    """Options of tools/merge_models.py."""

    models: tuple[Path, ...] = option(
        "at least two checkpoints of the same model, in the same layout; the result gets the names and "
        "metadata of the first one",
        nargs="+",
        place="there",
        required=True,
    )
    output: Path = option(
        "file to write",
        place="safetensors",
        must_not_replace="models",
        required=True,
        known_as=("save_to",),
    )
    ratios: tuple[float, ...] | None = option(
        "share of each file of --models, in the same order. Their sum is 1, and a share may be negative: "
        "1 1 -1 adds to the first model what distinguishes the second from the third. Default: equal shares",
        nargs="+",
    )
    unet_only: bool = option("merge only the U-Net; text encoders and VAE come from the first model")
    device: str = option("device that computes, such as cuda", default="cpu")
    saving_precision: str = option(
        "dtype of the result",
        default="float",
        choices=tuple(DTYPES),
        known_as=("save_precision",),
    )
    show_skipped: bool = option("list the tensors that are not merged because the first model lacks them")
    precision = not_needed("it is computed in float.", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        """Raise OptionError unless there are at least two models, and ratios whose sum is 1."""
        if len(self.models) < 2:
            raise OptionError("--models names only one file: use at least two")
        if self.ratios is None:
            return
        if len(self.ratios) != len(self.models):
            raise OptionError(
                f"--ratios has {len(self.ratios)} numbers for {len(self.models)} files of --models: pass one "
                "for each, in the same order"
            )
        if not all(map(math.isfinite, self.ratios)):
            raise OptionError("--ratios: use numbers, such as 0.5 0.5, not nan or inf")
        total = sum(self.ratios)
        if abs(total - 1) > ROUNDED_SUM:
            raise OptionError(
                f"--ratios add up to {total:g}, so all weights of the result would have {total:g} times "
                "their size, and its images would be noise. Use numbers whose sum is 1, such as 0.5 0.5"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the coefficient of each model in the weighted sum; equal coefficients by default."""
        return self.ratios or (1 / len(self.models),) * len(self.models)


def merge_models(options: MergeModelsOptions) -> None:
    """Write the weighted sum of several checkpoints, reading one tensor of each at a time.

    Raises:
        CheckpointError: If a file cannot be read, or is a checkpoint of a different model.
        OutputError: If the result cannot be written.
    """
    device = select_device(options.device)
    with ExitStack() as opened:
        models = [dequantized_on_read(opened.enter_context(open_checkpoint(path))) for path in options.models]
        first, *others = models
        for model in models:
            if is_lora(model.tensors):
                raise CheckpointError(
                    f"{model.path} is a LoRA or a similar network, not a complete checkpoint. Use "
                    "networks/merge_lora.py or networks/svd_merge_lora.py",
                    model.path,
                )
        saved_infos = {name: info for name, info in first.tensors.items() if not name.startswith(EMA_PREFIX)}
        # The names of the tensors that are averaged; integers are copied from the first model
        merged_names = {name for name, info in saved_infos.items() if info.dtype.is_floating_point}
        if options.unet_only:
            merged_names = {name for name in merged_names if name.startswith(UNET)}
        for other in others:
            _check_fits(first, other, merged_names, options.unet_only)
        _warn_of_skipped_tensors(models, saved_infos, options)
        _log_averages(first, len(first.tensors) - len(saved_infos))
        written_infos = _with_dtype(saved_infos, DTYPES[options.saving_precision])
        terms = [_Term(model, share) for model, share in zip(models, options.shares, strict=True)]

        def read(name: str) -> Tensor:
            tensor = first.read(name)
            check_finite(first.path, name, tensor)
            if name in merged_names:
                tensor = _add_up(name, tensor.to(device), terms)
            return tensor.to(written_infos[name].dtype)

        stream_tensors(options.output, written_infos, read, _make_metadata(models))
    _show(options, len(merged_names))


def _with_dtype(tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Return the tensors of the new file: floating-point tensors get the dtype, all others keep theirs."""
    written = {}
    for name, info in tensors.items():
        written[name] = replace(info, dtype=dtype) if info.dtype.is_floating_point else info
    return written


def _log_averages(checkpoint: Checkpoint, num_averages: int) -> None:
    """Log how many training averages (EMA weights) in a checkpoint are left out."""
    if num_averages:
        count = format_count(num_averages, "average")
        verb = "is" if num_averages == 1 else "are"
        logger.info("%s of %s %s left out, because averages are not merged", count, checkpoint.path, verb)


@dataclass(frozen=True)
class _Term:
    """A checkpoint and its coefficient in the weighted sum."""

    model: Checkpoint
    share: float


def _add_up(name: str, first_tensor: Tensor, terms: Sequence[_Term]) -> Tensor:
    """Return the weighted sum of one tensor of all models, in float32."""
    # If a model lacks the tensor, or some of its input channels, the first model's values are used instead.
    first = first_tensor.float()
    total = first * terms[0].share
    for term in terms[1:]:
        values = first  # used if this model lacks the tensor
        if name in term.model.tensors:
            tensor = term.model.read(name)
            check_finite(term.model.path, name, tensor)
            values = tensor.to(first.device, torch.float32)
        if values.shape != first.shape:  # an inpainting model's first layer, which has more input channels
            values = torch.cat([values, first[:, values.shape[1] :]], dim=1)
        total += values * term.share
    return total


def _check_fits(first: Checkpoint, other: Checkpoint, merged: set[str], unet_only: bool) -> None:
    """Raise CheckpointError if a checkpoint differs from the first one in model or layout."""
    common_names = merged & other.tensors.keys()
    if not common_names:
        tensor_kind = "tensors of a U-Net, model.diffusion_model," if unet_only else "tensors"
        raise CheckpointError(
            f"{other.path} and {first.path} have no {tensor_kind} in common: they are different models, or "
            "one is a single file and the other in diffusers' layout. Pass single files of one model.",
            other.path,
        )
    misshapen = [name for name in sorted(common_names) if not _has_fitting_shape(first, other, name)]
    if not misshapen:
        return
    shapes = (first.tensors[misshapen[0]].shape, other.tensors[misshapen[0]].shape)
    hint = "They are different models. Pass checkpoints of one model."
    if misshapen[0] in FIRST_LAYERS and len(misshapen) == 1:
        hint = f"{other.path.name} is an inpainting model: pass it as the first of --models."
    raise CheckpointError(
        f"{other.path} does not fit {first.path}: {pluralize(len(misshapen), 'tensors have other sizes')}, "
        f"such as {misshapen[0]}, {list(shapes[1])} instead of {list(shapes[0])}. {hint}",
        other.path,
    )


def _has_fitting_shape(first: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Return whether the shapes are equal, or the other model's first layer has fewer input channels."""
    shape = first.tensors[name].shape
    its_shape = other.tensors[name].shape
    if shape == its_shape:
        return True
    return (
        name in FIRST_LAYERS
        and len(shape) == len(its_shape) == 4
        and its_shape[1] < shape[1]
        and (its_shape[0], *its_shape[2:]) == (shape[0], *shape[2:])
    )


def _warn_of_skipped_tensors(
    models: Sequence[Checkpoint], saved: Mapping[str, TensorInfo], options: MergeModelsOptions
) -> None:
    """Warn of tensors that only some of the models contain."""
    first, *others = models
    for other in others:
        skipped = [
            name for name in sorted(other.tensors) if name not in saved and not name.startswith(EMA_PREFIX)
        ]
        if skipped:
            skipped_names = ", ".join(skipped) if options.show_skipped else list_some(skipped, 3)
            logger.warning(
                "%s: %s not in %s, and skipped: %s",
                other.path,
                format_count(len(skipped), "tensor"),
                first.path,
                skipped_names,
            )
        missing = [name for name in sorted(saved) if name not in other.tensors]
        if missing:
            logger.warning(
                "%s lacks %s, for which %s gets its share too: %s",
                other.path,
                format_count(len(missing), "tensor"),
                first.path,
                list_some(missing, 3),
            )


def _make_metadata(models: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the first model's metadata without its hashes, plus the names of the merged files."""
    metadata = {key: text for key, text in models[0].metadata.items() if not key.startswith(_STALE)}
    metadata["modelspec.merged_from"] = ", ".join(model.path.name for model in models)
    return metadata


def _show(options: MergeModelsOptions, num_merged: int) -> None:
    shares = zip(options.models, options.shares, strict=True)
    rows = [
        ("models", "\n".join(f"{path}, share {share:g}" for path, share in shares)),
        ("merged", format_count(num_merged, "tensor")),
        ("result", f"{options.output} ({format_size(options.output.stat().st_size)})"),
    ]
    show_box("The models are merged", rows)
