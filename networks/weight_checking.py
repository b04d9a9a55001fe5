"""Report the magnitude of a LoRA's weights, tensor by tensor, and tensors with NaN or infinite values."""

import sys
from pathlib import Path

from torch import Tensor

from checkpoints.opening import open_checkpoint
from modules.console import format_count
from modules.errors import CheckpointError
from modules.options import Options, option


class WeightCheckOptions(Options, title="what to do"):
    """Options of networks/check_lora_weights.py."""

    file: Path = option("LoRA file", positional=True, place="file")
    show_all_keys: bool = option(
        "print all tensors, not only the two matrices of each LoRA module", flags=("--show_all_keys", "-s")
    )


def check_weights(options: WeightCheckOptions) -> None:
    """Print the mean and the smallest absolute value of each tensor of a LoRA.

    Raises:
        CheckpointError: If a tensor contains NaN or infinite values.
    """
    damaged = []
    with open_checkpoint(options.file) as checkpoint:
        names = [name for name in sorted(checkpoint.tensors) if options.show_all_keys or _is_matrix(name)]
        # down and up factors count as one module
        modules = {name.rpartition(".lora_")[0] for name in checkpoint.tensors if _is_matrix(name)}
        sys.stdout.write(f"{format_count(len(modules), 'LoRA module')}\n")
        for name in names:
            tensor = checkpoint.read(name)
            sys.stdout.write(f"{name}: {_describe(tensor)}\n")
            if not tensor.float().isfinite().all():
                damaged.append(name)
    if damaged:
        raise CheckpointError(
            f"{options.file}: {format_count(len(damaged), 'tensor')} with values that are NaN or infinite, "
            f"such as {damaged[0]}. Take an earlier file, and train with a lower learning rate.",
            options.file,
        )


def _is_matrix(name: str) -> bool:
    return ".lora_up." in name or ".lora_down." in name or ".lora_A." in name or ".lora_B." in name


def _describe(tensor: Tensor) -> str:
    values = tensor.float().abs()
    shape = " x ".join(map(str, tensor.shape)) or "one number"
    return f"{shape}, mean |x| {values.mean():.6g}, least |x| {values.min():.6g}"
