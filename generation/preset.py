"""Options that --optimized turns on, as far as this machine has them."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from generation.options import GenerationOptions
from generation.preset_options import as_typed
from modules.attention.attend import check_backend
from modules.checkpoints.opening import open_checkpoint
from modules.compile import check_compilation
from modules.contract.family import Family
from modules.contract.loading import Placement
from modules.errors import OptionError
from modules.fp8.products import add_product
from modules.speed_options import GenerationSpeedOptions

logger = logging.getLogger(__name__)

FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
Check = Callable[[GenerationSpeedOptions], object]  # raises OptionError


def leave_out_missing(family: Family, options: GenerationOptions, device: torch.device) -> GenerationOptions:
    """Turn off the options of --optimized that are unavailable here, each with a warning that says why, and
    log the rest in one line.

    Options given by name stay: if unavailable, they are an error later.
    """
    if not options.speed.by_preset + options.speed.not_by_preset or options.latent_path:
        return options  # decoding runs no transformer
    files = family.dit_files  # one that is missing is an error of its own

    def check_attention(speed: GenerationSpeedOptions) -> None:
        placement = Placement(device, attention=speed.attention.choice)
        check_backend(placement.attention, device, lambda: family.compute_dtype(placement), training=False)

    checks: dict[str, Check] = {
        "attn_mode": check_attention,
        "compile": lambda speed: check_compilation(speed.compilation.choice, device),
        "fp8_scaled": lambda _: _check_rounding(files, device),
        "fp8_fast": lambda speed: add_product(speed.fp8.quantisation, device),
        "fp16_accumulation": lambda _: _check_fp16_sums(device),
    }
    speed, left_out = options.speed, []
    for name in (name for name in checks if name in options.speed.by_preset):
        try:
            checks[name](speed)
        except OptionError as error:
            logger.warning("--optimized goes without --%s here. %s", name, error)
            speed = _without(speed, name, has_loras=bool(options.lora.lora_weight))
            left_out.append(name)
    logger.info("%s", describe_preset(options, left_out))
    if not left_out:
        return options
    settings: dict[str, Any] = {
        name: value for name, value in options.settings.items() if name not in left_out
    }
    if speed.fp8.fp8 and not options.speed.fp8.fp8:
        settings["fp8"] = True
    return replace(options, speed=speed, settings=settings)


def describe_preset(options: GenerationOptions, left_out: Sequence[str]) -> str:
    """Return a line on the options that --optimized sets in this run, leaves out, and has replaced."""
    speed = options.speed
    values = dict.fromkeys(speed.by_preset, True) | dict(options.settings)
    used = [as_typed(values, name) for name in speed.by_preset if name not in left_out]
    parts = [f"--optimized sets {' '.join(used) or 'nothing'}"]
    if left_out:
        names = ", ".join(as_typed(values, name) for name in left_out)
        parts.append(f"left out, as the warnings above say why: {names}")
    if speed.not_by_preset:
        names = ", ".join(f"--{name}" for name in speed.not_by_preset)
        parts.append(f"left to what you gave: {names}")
    return "; ".join(parts)


def _without(speed: GenerationSpeedOptions, name: str, has_loras: bool) -> GenerationSpeedOptions:
    speed = replace(speed, by_preset=tuple(one for one in speed.by_preset if one != name))
    if name == "attn_mode":
        return replace(speed, attention=replace(speed.attention, attn_mode="torch"))
    if name == "compile":
        return replace(speed, compilation=replace(speed.compilation, compile=False))
    if name == "fp8_scaled":  # a file in fp8 stays as it is, unless a LoRA has to be merged into it
        is_kept = not has_loras
        fast = speed.fp8.fp8_fast and is_kept
        return replace(speed, fp8=replace(speed.fp8, fp8_scaled=False, fp8=is_kept, fp8_fast=fast))
    if name == "fp8_fast":
        return replace(speed, fp8=replace(speed.fp8, fp8_fast=False))
    return replace(speed, fp16_accumulation=False)


def _check_rounding(files: Sequence[Path], device: torch.device) -> None:
    if device.type == "mps":
        raise OptionError("Apple's GPUs have no numbers of 8 bits.")
    for path in files:
        with contextlib.closing(open_checkpoint(path)) as checkpoint:
            is_rounded = any(info.dtype in FP8_DTYPES for info in checkpoint.tensors.values())
        if is_rounded:
            raise OptionError(f"{path} is in fp8 already, and rounding it again would only lose more.")


def _check_fp16_sums(device: torch.device) -> None:
    if device.type != "cuda":
        raise OptionError(f"It is for matrix products on a CUDA GPU, and this run computes on {device.type}.")
    if not hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation"):
        raise OptionError(f"It needs torch 2.7 or later, and this is {torch.__version__}.")
