"""Add LoRAs to a model file: write another one, tensor by tensor."""

import time
from collections.abc import Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from modules.atomic_write import free_bytes
from modules.checkpoints.finite import FiniteCheck
from modules.checkpoints.opening import Checkpoint, checkpoint_paths, open_checkpoint
from modules.checkpoints.writing import stream_tensors
from modules.console import as_size, in_words, show_box
from modules.contract.loading import TensorInfo
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.output_files import refuse_replacing
from networks.merge import LoraPatch, LoraUse
from networks.names.layouts import FIRST_LAYERS
from networks.whole_checkpoints import WholePatch, is_whole, warn_of_texts

logger = getLogger(__name__)
_META = torch.device("meta")
_WIDE = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_STALE = ("sshs_", "modelspec.hash_sha256")  # hashes of the model before the merge


def merge_into_file(
    model: Path,
    uses: Sequence[LoraUse],
    output: Path,
    device: torch.device,
    in_channels: int | None = None,
    dtype: torch.dtype | None = None,
    option: str = "--save_merged_model",
) -> None:
    """Write the model with the LoRAs added as one safetensors file; keep names, dtypes and metadata.

    dtype: of the result's weights; None: as in the model. option: that names `output`, for messages.

    Memory: the LoRAs, one tensor of the model at a time, and some MB (for LoKr: the tensor's change in
    float32). in_channels: what the model's first layer has to take. Raises CheckpointError where a file is
    unusable or a LoRA fits nothing, OptionError where the result would replace one of them, OutputError where
    it cannot be written.
    """
    start = time.monotonic()
    refuse_replacing(option, output, [*checkpoint_paths(model), *(use.lora.path for use in uses)])
    with open_checkpoint(model) as checkpoint:
        if in_channels is not None:
            _check_in_channels(checkpoint, in_channels)
        whole = is_whole(checkpoint.tensors)
        if not whole:
            warn_of_texts(uses, model, held=())
        patch: LoraPatch | WholePatch = (WholePatch if whole else LoraPatch)(uses, checkpoint.tensors, model)
        written: dict[str, TensorInfo] = {}
        # a LoRA of another model is found out before anything is written
        for name, info in checkpoint.tensors.items():
            _refuse_rounded(patch, name, info, model)
            written[name] = _info_in(info, dtype)
            patch.add_to(name, torch.empty(info.shape, dtype=info.dtype, device=_META))
        patch.check()

        finite = FiniteCheck(model)

        def read(name: str) -> Tensor:
            tensor = checkpoint.read(name)  # memory of its own
            finite.note(name, tensor)
            if not patch.touches(name):
                return tensor.to(written[name].dtype)
            wide = tensor.to(device) if dtype is None else tensor.to(device, torch.float32)
            return patch.add_to(name, wide).to(written[name].dtype)

        needed = sum(info.size_bytes for info in written.values())
        _show_start(model, uses, output, needed)
        metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(_STALE)}
        if not uses:
            logger.warning(f"no --lora_weight is given: {output} becomes a copy of {model}")
        else:
            metadata["modelspec.merged_from"] = ", ".join([model.name, *(use.lora.path.name for use in uses)])
        stream_tensors(output, written, read, metadata)
    result = f"{output} ({as_size(output.stat().st_size)})"
    show_box("Merging is finished", [("Merged model", result), ("time", in_words(time.monotonic() - start))])


def _info_in(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """Return what is said of a tensor once it is in a dtype; whole numbers and 8-bit weights stay."""
    return info if dtype is None or info.dtype not in _WIDE else replace(info, dtype=dtype)


def _show_start(model: Path, uses: Sequence[LoraUse], output: Path, needed: int) -> None:
    """Show what is merged. needed: bytes of the result."""
    free = as_size(free_bytes(output.resolve().parent))
    loras = "\n".join(f"{use.lora.path}, strength {use.multiplier:g}" for use in uses)
    rows = [("model", str(model)), ("LoRAs", loras), ("result", str(output))]
    show_box("Merging", [*rows, ("disk", f"{as_size(needed)}; {free} free")])


def _refuse_rounded(patch: LoraPatch | WholePatch, name: str, info: TensorInfo, model: Path) -> None:
    if patch.touches(name) and info.dtype not in _WIDE:
        raise CheckpointError(
            f"{model} stores {name} as {dtype_name(info.dtype)}, too coarse to add a LoRA to.\n"
            "  Give the bf16 or fp16 file of the model; fp8 can be made from the merged one.",
            model,
        )


def _check_in_channels(checkpoint: Checkpoint, in_channels: int) -> None:
    first = [name for name in checkpoint.tensors if name.endswith(FIRST_LAYERS)]
    found = checkpoint.tensors[first[0]].shape[1] if first else None  # out x in x kernel
    if found != in_channels:
        what = f"{first[0]} takes {found} channels" if first else "it has no first layer that is known"
        raise CheckpointError(
            f"{checkpoint.path}: {what}, --dit_in_channels asks for {in_channels}.", checkpoint.path
        )
