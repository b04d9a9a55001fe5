"""Modules that enlarge the first stage's pictures (--highres_fix_upscaler): ours or the user's own.

Such a module has `create_upscaler(**args)`. What it returns has `upscale(vae, imgs, latents, dtype, width,
height, batch_size, vae_batch_size)`, which returns as many pictures (PIL) or latents (B 4 h w, as the U-Net
sees them). It gets pictures (`latents` is None), or latents (`imgs` is None) if its `support_latents()`
says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from modules.errors import OptionError, UserError
from modules.user_modules import import_user_module
from stable_diffusion.contract import Made, Model, SecondStart
from stable_diffusion.pixels import STRIDE, fit

OPTION = "--highres_fix_upscaler"
OURS = "stable_diffusion.model_upscaler"


@dataclass(frozen=True, eq=False)
class UpscalingModule:
    """What a module made, and the name that the user gave it."""

    name: str
    made: Any
    takes_latents: bool

    def upscale(self, model: Model, made: Made, width: int, height: int, vae_batch: int) -> SecondStart:
        """Return a stage's result as pictures or latents for that size in pixels.

        Raises OptionError if the module fails or returns something else.
        """
        images = None if self.takes_latents or made.images is None else list(made.images)
        latents = made.latents.to(model.device, model.dtype) if self.takes_latents else None
        count = len(made.latents)
        try:
            result = self.made.upscale(
                model.vae, images, latents, model.dtype, width, height, count, vae_batch
            )
        except UserError:
            raise
        except Exception as error:  # the module may run any code of its own
            raise OptionError(f"{OPTION} {self.name} failed: {type(error).__name__}: {error}") from error
        return self._start(result, count, (width, height))

    def _start(self, result: Any, count: int, size: tuple[int, int]) -> SecondStart:
        if isinstance(result, Tensor):
            wanted = (count, 4, size[1] // STRIDE, size[0] // STRIDE)
            if tuple(result.shape) != wanted or not bool(torch.isfinite(result).all()):
                raise self._bad(f"latents of {' x '.join(map(str, result.shape))}, or not finite", wanted)
            return SecondStart(latents=result.float())
        images = list(result) if isinstance(result, Sequence) and not isinstance(result, str) else []
        if len(images) != count or not all(isinstance(image, Image) for image in images):
            raise self._bad(type(result).__name__, (count, 4, size[1] // STRIDE, size[0] // STRIDE))
        return SecondStart(images=[fit(image.convert("RGB"), *size) for image in images])

    def _bad(self, what: str, wanted: tuple[int, ...]) -> OptionError:
        return OptionError(
            f"{OPTION} {self.name} returned {what}. Its upscale(...) has to return a list of {wanted[0]} PIL "
            f"pictures, or latents of {' x '.join(map(str, wanted))}"
        )


def load_upscaler(name: str, args: str | None) -> UpscalingModule:
    """Import a module and make its upscaler. args: `key=value`, several joined by `;`.

    Raises OptionError if it cannot be used.
    """
    hint = f" Install it, or give {OURS}, which takes SwinIR and ESRGAN files (model=FILE)."
    module = import_user_module(OPTION, name, OURS, hint)
    if not callable(getattr(module, "create_upscaler", None)):
        raise OptionError(f"{OPTION} {name} has no create_upscaler(...), so it makes no upscaler.{hint}")
    try:
        made = module.create_upscaler(**read_args(args or ""))
        takes_latents = bool(made.support_latents()) if hasattr(made, "support_latents") else False
    except UserError:
        raise
    except Exception as error:  # the module may run any code of its own
        raise OptionError(
            f"{OPTION} {name} with --highres_fix_upscaler_args {args or '(none)'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(made, "upscale", None)):
        raise OptionError(f"{OPTION} {name}: what its create_upscaler(...) returns has no upscale(...)")
    return UpscalingModule(name, made, takes_latents)


def read_args(text: str) -> dict[str, str]:
    """Read `key=value`, several joined by `;`. Raises OptionError."""
    args = {}
    for part in filter(str.strip, text.split(";")):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key.isidentifier():
            raise OptionError(
                f"--highres_fix_upscaler_args {text}: write key=value, several joined by ; such as "
                '"model=4x.safetensors;tile=256"'
            )
        args[key] = value
    return args
