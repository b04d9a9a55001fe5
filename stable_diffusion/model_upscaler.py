"""Upscale the first stage's images with a SwinIR or ESRGAN file.

For --highres_fix_upscaler stable_diffusion.model_upscaler --highres_fix_upscaler_args model=4x.safetensors;
further arguments are those of blissful_tuner/upscaler.py: dtype, tile, tile_overlap, batch_size, compile.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from modules.devices import select_compute_dtype
from modules.errors import OptionError
from modules.media.encoding import OutputFrame
from modules.options import read_options
from modules.parser import add_options
from modules.paths import explain_missing
from postprocessing.contract import Clip, Stage
from postprocessing.options import UpscalerOptions
from postprocessing.upscaling.files import check_file
from postprocessing.upscaling.stage import make_upscaler

SETTING_NAMES = ("model", "dtype", "tile", "tile_overlap", "batch_size", "compile")
ARGS = "--highres_fix_upscaler_args"


@dataclass
class ModelUpscaler:
    """Upscale images with a network that is loaded when it is first needed."""

    options: UpscalerOptions
    _stages: dict[torch.device, Stage] = field(default_factory=dict)

    def upscale(
        self,
        vae: Any,
        imgs: Sequence[Image.Image],
        latents: None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int,
        vae_batch_size: int,
    ) -> list[Image.Image]:
        """Return the enlarged images; the caller resizes them to the final size."""
        # arguments of the call that all upscalers share, which this one does not need
        del latents, dtype, batch_size, vae_batch_size, width, height
        stage = self._stages.get(vae.device)  # the loaded network
        if stage is None:
            stage = self._stages.setdefault(vae.device, make_upscaler(self.options, vae.device))
        clip = Clip(self.options.network.model, *imgs[0].size, None, len(imgs), is_deep=False)
        # images have no time: they start at 0 and take 1 second
        images = (OutputFrame(np.asarray(image), Fraction(0), Fraction(1)) for image in imgs)
        return [Image.fromarray(picture.pixels) for picture in stage.run(images, clip)]


def create_upscaler(**args: str) -> ModelUpscaler:
    """Return the upscaler for --highres_fix_upscaler_args, after checking its settings and its file.

    Raises OptionError for unknown settings, or CheckpointError for a file with a different network.
    """
    unknown = sorted(args.keys() - set(SETTING_NAMES))
    if unknown or "model" not in args:
        problem = f"{unknown[0]} is not known; " if unknown else ""
        other_names = ", ".join(SETTING_NAMES[1:])  # without `model`, which the message names first
        raise OptionError(
            f"{ARGS}: {problem}give model=FILE, a SwinIR or ESRGAN file, and where needed {other_names}, "
            "joined by ;"
        )
    parser = _Parser(prog=ARGS)
    add_options(parser, UpscalerOptions)
    options = read_options(UpscalerOptions, parser.parse_args(_as_argv(args)))
    if not options.network.model.exists():
        hint = explain_missing(options.network.model)
        raise OptionError(f"{ARGS} model={args['model']}: no such file.{hint} Pass a SwinIR or ESRGAN file")
    kind, config = check_file(options.network.model)
    options = replace(options, mode=kind.mode, scale=config.factor)  # both are read from the file
    select_compute_dtype(options.network.dtype, "--dtype", torch.float32)
    return ModelUpscaler(options)


def _as_argv(args: Mapping[str, str]) -> list[str]:
    """Return `key=value` settings as command-line arguments."""
    words = [f"--{key}={value}" for key, value in args.items() if key != "compile"]
    if args.get("compile", "").lower() in ("1", "true", "yes"):
        words.append("--compile")
    return words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{ARGS}: {message.removeprefix('argument --')}")
