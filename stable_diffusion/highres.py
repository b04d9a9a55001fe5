"""Highres fix: generate a small image, enlarge it, then denoise it at full size (--highres_fix_scale)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate

from modules.errors import OptionError, UserError
from modules.installation import import_user_module
from stable_diffusion.contract import ImageSettings, Model, RequestedImage, SecondStageInput, StageResult
from stable_diffusion.making import ImageGenerator
from stable_diffusion.sampling_options import HighresOptions
from stable_diffusion.starting import STRIDE, fit, latent_size, vae_batch

# Modules that upscale the first stage's images (--highres_fix_upscaler): built in or the user's.
#
# Such a module has `create_upscaler(**args)`. What it returns has `upscale(vae, imgs, latents, dtype, width,
# height, batch_size, vae_batch_size)`, which returns as many images (PIL) or latents (B 4 h w, as the U-Net
# sees them). It gets images (`latents` is None), or latents (`imgs` is None) if its `support_latents()`
# says so.
OPTION = "--highres_fix_upscaler"
BUILT_IN_UPSCALER = "stable_diffusion.model_upscaler"
# modules of sd-scripts -> modules of this package
MODULE_ALIASES = {"tools.latent_upscaler": "stable_diffusion.latent_upscaler"}


@dataclass(frozen=True, eq=False)
class UpscalingModule:
    """An upscaler from the user's Python module, and the module's name as given in the option."""

    name: str
    upscaler: Any
    takes_latents: bool

    def upscale(
        self, model: Model, stage: StageResult, width: int, height: int, vae_batch: int
    ) -> SecondStageInput:
        """Call the user's upscaler on the first stage's result; check and return its output.

        Raises:
            OptionError: If the module fails or returns something else.
        """
        images = None
        latents = None
        if self.takes_latents:
            latents = stage.latents.to(model.device, model.dtype)
        elif stage.images is not None:
            images = list(stage.images)
        count = len(stage.latents)
        # positional, because upscalers of other programs use other parameter names
        result = self._call_upscaler(
            model.vae,
            images,
            latents,
            model.dtype,
            width,
            height,
            count,
            vae_batch,
        )
        # The images or latents that the upscaler returned; raise OptionError for anything else
        shape = (count, 4, height // STRIDE, width // STRIDE)
        if isinstance(result, Tensor):
            if tuple(result.shape) == shape and bool(torch.isfinite(result).all()):
                return SecondStageInput(latents=result.float())
            returned = f"latents of {_in_words(result.shape)}, or not finite"
        elif _are_images(result, count):
            return SecondStageInput(images=[fit(image.convert("RGB"), width, height) for image in result])
        else:
            returned = type(result).__name__
        raise OptionError(
            f"{OPTION} {self.name} returned {returned}. Its upscale(...) has to return a list of {count} PIL "
            f"images, or latents of {_in_words(shape)}"
        )

    def _call_upscaler(self, *arguments: Any) -> Any:
        """Call the user's code; raise OptionError for any error in it."""
        try:
            return self.upscaler.upscale(*arguments)
        except UserError:
            raise
        except Exception as error:  # the module may run any code of its own
            raise OptionError(f"{OPTION} {self.name} failed: {type(error).__name__}: {error}") from error


def _in_words(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _are_images(result: Any, count: int) -> bool:
    """Return whether an upscaler module's result is a list of `count` images."""
    if not isinstance(result, Sequence) or len(result) != count:
        return False
    return all(isinstance(image, Image) for image in result)


def load_upscaler(name: str, args: str | None) -> UpscalingModule:
    """Import the user's upscaler module and create its upscaler.

    Args:
        name: Name of the module.
        args: Arguments as `key=value`, several joined by `;`.

    Raises:
        OptionError: If the module cannot be used.
    """
    hint = f" Or pass {BUILT_IN_UPSCALER}, which takes SwinIR and ESRGAN files (model=FILE)."
    module = import_user_module(OPTION, MODULE_ALIASES.get(name, name), BUILT_IN_UPSCALER, hint)
    if not callable(getattr(module, "create_upscaler", None)):
        raise OptionError(
            f"{OPTION} {name} has no create_upscaler(...), so it cannot make an upscaler.{hint}"
        )
    try:
        upscaler = module.create_upscaler(**parse_upscaler_args(args or ""))
        takes_latents = bool(upscaler.support_latents()) if hasattr(upscaler, "support_latents") else False
    except UserError:
        raise
    except Exception as error:  # the module may run any code of its own
        raise OptionError(
            f"{OPTION} {name} with --highres_fix_upscaler_args {args or '(none)'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(upscaler, "upscale", None)):
        raise OptionError(f"{OPTION} {name}: the result of its create_upscaler(...) has no upscale(...)")
    return UpscalingModule(name, upscaler, takes_latents)


def parse_upscaler_args(text: str) -> dict[str, str]:
    """Parse `key=value` pairs separated by `;`; raise OptionError if a pair is malformed."""
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


FIRST, SECOND = "0", "1"  # part of file names, before the index of the image


@dataclass(frozen=True, eq=False)
class SavedStage:
    """Images of one sampling stage to save, and the stage marker for their file names."""

    # with the requested seeds and this stage's settings
    requests: Sequence[RequestedImage]
    result: StageResult
    stage_digit: str  # in file names: FIRST or SECOND; empty if there is one stage


class Highres(NamedTuple):
    """Options of two-stage generation, and the upscaler between the stages, if any."""

    options: HighresOptions
    upscaler: UpscalingModule | None


def prepare_highres(options: HighresOptions) -> Highres | None:
    """Import the upscaler for the first stage's images, before the model is loaded.

    Returns:
        The second stage with its upscaler; None if there is a single stage.

    Raises:
        OptionError: If --highres_fix_upscaler cannot be used.
    """
    if options.highres_fix_scale is None:
        return None
    name = options.highres_fix_upscaler
    upscaler = None if name is None else load_upscaler(name, options.highres_fix_upscaler_args)
    return Highres(options, upscaler)


def make_images(
    image_generator: ImageGenerator, highres: Highres | None, requests: Sequence[RequestedImage]
) -> Iterator[SavedStage]:
    """Generate a batch in one or two stages; yield the images of each stage that is saved, once finished.

    With --highres_fix_scale:
    1. Generate small images.
    2. Enlarge them, or their latents.
    3. Add noise to the result, and denoise it at the final size.

    Args:
        image_generator: Generates the images of one stage.
        highres: Options and upscaler of the second stage; None for one stage.
        requests: Images of equal settings.

    Raises:
        UserError: If an input image cannot be used, or if --highres_fix_upscaler fails.
    """
    if highres is None:
        yield SavedStage(requests, image_generator.make(requests), "")
        return
    options, upscaler = highres
    settings = requests[0].settings
    first_settings = _make_first_settings(options, settings)
    first_requests = [replace(request, settings=first_settings) for request in requests]
    enlarges_latents = options.highres_fix_latents_upscaling if upscaler is None else upscaler.takes_latents
    wants_images = options.highres_fix_save_1st or not enlarges_latents
    first_result = image_generator.make(first_requests, None, wants_images)
    if options.highres_fix_save_1st:
        yield SavedStage(first_requests, first_result, FIRST)
    start = enlarge(image_generator, highres, first_result, settings)
    del first_result
    second_requests = _make_second_requests(options, settings, requests)
    # another seed: with the first stage's noise, the second would add the same pattern once more
    reseeded = [
        replace(request, seed=request.seed + 1 if request.seed < 2**64 - 1 else 0)
        for request in second_requests
    ]
    yield SavedStage(second_requests, image_generator.make(reseeded, start), SECOND)


def _make_second_requests(
    options: HighresOptions, settings: ImageSettings, requests: Sequence[RequestedImage]
) -> list[RequestedImage]:
    """Return the requests of the second stage, with its own strength and, if asked, without ControlNets."""
    if options.highres_fix_strength is not None:
        settings = replace(settings, strength=options.highres_fix_strength)
    if options.highres_fix_disable_control_net:
        return [replace(request, settings=settings, guides=()) for request in requests]
    return [replace(request, settings=settings) for request in requests]


def _make_first_settings(options: HighresOptions, settings: ImageSettings) -> ImageSettings:
    """Return the settings of the first stage: a smaller size and its own number of steps."""
    scale = options.highres_fix_scale
    assert scale is not None

    def scaled(side: int) -> int:
        # round to the nearest pixel, then down to a multiple of the VAE's stride
        return max(int(side * scale + 0.5) // STRIDE, 1) * STRIDE

    return replace(
        settings,
        width=scaled(settings.width),
        height=scaled(settings.height),
        steps=options.highres_fix_steps,
    )


def enlarge(
    image_generator: ImageGenerator, highres: Highres, result: StageResult, settings: ImageSettings
) -> SecondStageInput:
    """Enlarge the first stage's result, by upscaler or interpolation, as input of the second stage.

    Args:
        image_generator: Generates the images of one stage.
        highres: Options and upscaler of the second stage.
        result: Result of the first stage.
        settings: Settings of the final image.

    Raises:
        OptionError: If --highres_fix_upscaler fails.
    """
    options, upscaler = highres
    if upscaler is not None:
        return upscaler.upscale(
            image_generator.model,
            result,
            width=settings.width,
            height=settings.height,
            vae_batch=vae_batch(image_generator.vae_batch_size, len(result.latents)),
        )
    if options.highres_fix_latents_upscaling:
        latents = interpolate(result.latents.float(), latent_size(settings), mode="bicubic")
        return SecondStageInput(latents=latents)
    assert result.images is not None
    return SecondStageInput(images=[fit(image, settings.width, settings.height) for image in result.images])
