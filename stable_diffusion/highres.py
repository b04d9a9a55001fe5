"""Two stages: a small picture, enlarged, then made again at its full size (--highres_fix_scale)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch.nn.functional import interpolate

from stable_diffusion.contract import AskedPicture, Made, Model, PictureSettings, SecondStart
from stable_diffusion.highres_options import HighresOptions
from stable_diffusion.pixels import STRIDE, fit, latent_size, vae_batch
from stable_diffusion.upscalers import UpscalingModule, load_upscaler

FIRST, SECOND = "0", "1"  # in file names, before a picture's number


class Makes(Protocol):
    """What makes one stage: `stable_diffusion.making.Maker`."""

    @property
    def model(self) -> Model: ...

    def make(
        self, pictures: Sequence[AskedPicture], start: SecondStart | None = None, wants_images: bool = True
    ) -> Made: ...


@dataclass(frozen=True, eq=False)
class SavedStage:
    """One stage's result that is to be saved."""

    # with the seeds that were asked for, and with the settings of this stage
    pictures: Sequence[AskedPicture]
    made: Made
    digit: str  # in file names: FIRST or SECOND; empty where there is one stage only


@dataclass(frozen=True, eq=False)
class Highres:
    """How pictures are made in two stages; made once for a run, before the model is loaded."""

    options: HighresOptions
    upscaler: UpscalingModule | None = None
    vae_batch_size: float | None = None  # --vae_batch_size: below 1 it is a share of a batch


def prepare_highres(options: HighresOptions, vae_batch_size: float | None = None) -> Highres | None:
    """Import what enlarges the first stage's pictures. None: there is one stage only.

    Raises OptionError if --highres_fix_upscaler cannot be used.
    """
    if options.highres_fix_scale is None:
        return None
    name = options.highres_fix_upscaler
    upscaler = None if name is None else load_upscaler(name, options.highres_fix_upscaler_args)
    return Highres(options, upscaler, vae_batch_size)


def make_pictures(
    maker: Makes, highres: Highres | None, pictures: Sequence[AskedPicture]
) -> Iterator[SavedStage]:
    """Make a batch: yield what is to be saved of each stage as soon as it is there.

    pictures: of equal settings, as `Maker.make` takes them. Raises UserError, as `Maker.make`, and if
    --highres_fix_upscaler fails.
    """
    if highres is None:
        yield SavedStage(pictures, maker.make(pictures), "")
        return
    options = highres.options
    first = first_stage(pictures, options)
    wants_images = options.highres_fix_save_1st or not _takes_latents(highres)
    made = maker.make(first, None, wants_images)
    if options.highres_fix_save_1st:
        yield SavedStage(first, made, FIRST)
    start = enlarge(highres, maker.model, made, pictures[0].settings)
    del made
    second = second_stage(pictures, options)
    result = maker.make([replace(picture, seed=_next(picture.seed)) for picture in second], start)
    yield SavedStage(second, result, SECOND)


def first_stage(pictures: Sequence[AskedPicture], options: HighresOptions) -> list[AskedPicture]:
    """Return the pictures as the first stage makes them: smaller, with the steps that it takes."""
    settings, scale = pictures[0].settings, options.highres_fix_scale
    assert scale is not None
    width, height = (_scaled(side, scale) for side in (settings.width, settings.height))
    small = replace(settings, width=width, height=height, steps=options.highres_fix_steps)
    return [replace(picture, settings=small) for picture in pictures]


def _next(seed: int) -> int:
    """Return the second stage's seed: its noise must not be that of the first, which made the picture."""
    return seed + 1 if seed < 2**64 - 1 else 0


def _scaled(side: int, scale: float) -> int:
    """Return a side of the small picture: the nearest pixel, then down to what the autoencoder can make."""
    return max(int(side * scale + 0.5) // STRIDE, 1) * STRIDE


def second_stage(pictures: Sequence[AskedPicture], options: HighresOptions) -> list[AskedPicture]:
    """Return the pictures as the second stage makes them, with the seeds that were asked for."""
    settings = pictures[0].settings
    if options.highres_fix_strength is not None:
        settings = replace(settings, strength=options.highres_fix_strength)
    guided = [replace(picture, settings=settings) for picture in pictures]
    if not options.highres_fix_disable_control_net:
        return guided
    return [replace(picture, guides=()) for picture in guided]


def _takes_latents(highres: Highres) -> bool:
    if highres.upscaler is None:
        return highres.options.highres_fix_latents_upscaling
    return highres.upscaler.takes_latents


def enlarge(highres: Highres, model: Model, made: Made, settings: PictureSettings) -> SecondStart:
    """Return the first stage's result in the size that is wanted, for the second stage to begin with.

    settings: of the whole picture. Raises OptionError if --highres_fix_upscaler fails.
    """
    size = settings.width, settings.height
    if highres.upscaler is not None:
        count = len(made.latents)
        return highres.upscaler.upscale(model, made, *size, vae_batch(highres.vae_batch_size, count))
    if highres.options.highres_fix_latents_upscaling:
        return SecondStart(latents=interpolate(made.latents.float(), latent_size(settings), mode="bicubic"))
    assert made.images is not None
    return SecondStart(images=[fit(image, *size) for image in made.images])
