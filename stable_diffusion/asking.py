"""Turn prompt lines into requested images: choose variants, draw seeds, resolve settings."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from modules.devices import Failures
from modules.errors import OptionError
from modules.media.reading import image_size
from modules.options import option_values, override_options
from stable_diffusion.contract import SDXL, ImageSettings, ModelKind, RequestedImage
from stable_diffusion.lines import (
    LINE_OPTIONS,
    MULTIPLIERS,
    SEEDS,
    Inputs,
    Line,
    enumerates,
    expand,
    read_line,
    read_line_seeds,
)
from stable_diffusion.options import GenImgOptions
from stable_diffusion.regions import check_regions, split_parts
from stable_diffusion.sampling_options import (
    DEFAULT_STRENGTH,
    DeepShrinkOptions,
    GradualLatentOptions,
    SamplingOptions,
)

logger = logging.getLogger(__name__)

SEEDS_END = 2**32  # drawn seeds are below this
SIDE = 8  # pixels per latent: sides are multiples of this


@dataclass
class Seeds:
    """A run's seeds: the user's first, then random ones.

    Attributes:
        random: Generator that random seeds are drawn from.
        single: Value of --seed, if the run generates only one image.
        round_seed: With --iter_same_seed, the seed of each prompt's first image in this round; the seeds of
            its other images are drawn from this one.
    """

    random: Random
    single: int | None = None
    round_seed: int | None = None

    def begin_round(self) -> None:
        """Draw a seed for the new round; it is the seed of each prompt's first image."""
        self.round_seed = _draw(self.random)

    def for_line(self, line_seeds: tuple[int, ...] | None) -> Iterator[int]:
        """Yield the seeds of a line's images: `line_seeds` first, then an endless sequence of random ones."""
        yield from line_seeds or ()
        if self.single is not None:
            yield self.single
        if self.round_seed is not None:
            yield self.round_seed
            # additional images of a prompt get the same seeds for every prompt of the round
            round_random = Random(self.round_seed)
            while True:
                yield _draw(round_random)
        while True:
            yield _draw(self.random)


def _draw(random: Random) -> int:
    return random.randrange(SEEDS_END)


def make_seeds(options: GenImgOptions, lines: Sequence[Line] | None) -> Seeds:
    """Return the source of a run's seeds.

    Args:
        options: Options of the run.
        lines: All lines of the run; None if lines are read one by one.
    """
    prompts = options.prompts
    seeds = Seeds(Random(prompts.seed))
    if lines is not None and len(lines) == 1 and prompts.n_iter == 1:
        # all variants of `{e$$...}` groups have the same seed
        needs_one = prompts.images_per_prompt == 1 or (
            not lines[0].is_from_metadata and enumerates(lines[0].text)
        )
        seeds.single = prompts.seed if needs_one else None
    return seeds


@dataclass
class RequestBuilder:
    """Convert prompt lines to image requests.

    Attributes:
        num_images: Number of images so far in this round, which selects the next input image.
        num_lines: Number of lines read so far.
    """

    options: GenImgOptions
    kind: ModelKind
    inputs: Inputs
    seeds: Seeds
    num_images: int = 0
    num_lines: int = 0

    def build_requests(self, lines: Iterable[Line], failures: Failures) -> Iterator[RequestedImage]:
        """Yield the images that each prompt line requests; errors in a line are added to `failures`."""
        for line in lines:
            images: list[RequestedImage] = []
            self.num_lines += 1
            with failures.collect_errors(line.label):
                images = [
                    self._build_request(line, text, seed, number)
                    for number, (seed, text) in enumerate(self._list_seeds_and_prompts(line), self.num_images)
                ]
                self.num_images += len(images)
            yield from images

    def _list_seeds_and_prompts(self, line: Line) -> list[tuple[int, str]]:
        """Return each image's seed and prompt, in which one variant of each `{...}` group is chosen."""
        count = line.num_images or self.options.prompts.images_per_prompt
        if line.is_from_metadata:  # in the metadata of an image, options and variants are not parsed
            seeds = self.seeds.for_line(None)
            return [(next(seeds), line.text) for _ in range(count)]
        line_seeds = read_line_seeds(line.text)
        seeds = self.seeds.for_line(line_seeds)
        num_seeds = len(line_seeds or ())
        if enumerates(line.text):  # `{e$$...}`: an image of each variant, all with one seed
            if num_seeds > 1:
                _warn_of_unused_seeds(line, "All variants use the first one")
            seed = next(seeds)
            return [(seed, text) for text in expand(line.text, Random(seed))]
        if num_seeds > count:
            _warn_of_unused_seeds(line, "Raise --images_per_prompt to use all")
        # the seed of an image also draws its choices
        image_seeds = [next(seeds) for _ in range(count)]
        return [(seed, expand(line.text, Random(seed))[0]) for seed in image_seeds]

    def _build_request(self, line: Line, text: str, seed: int, number: int) -> RequestedImage:
        """Return the request for one image of a prompt line: its prompts, input files and settings."""
        values: dict[str, Any] = {"prompt": text, "negative_prompt": line.negative_prompt}
        if not line.is_from_metadata:
            values = read_line(text, line.label)  # the prompt and its options such as --n and --s
        number = number if line.image_number is None else line.image_number
        image = self.inputs.image(number)
        mask = self.inputs.mask(number)
        num_parts = len(split_parts(values["prompt"]))  # texts between AND
        if mask is not None and image is None:
            _check_has_parts(num_parts)
        if values.get("clip_prompt") and not self.options.guides.clip_guidance_scale:
            logger.warning(
                "--c is only recorded in the file: without --clip_guidance_scale CLIP does not read it"
            )
        settings = resolve_settings(self.options, values, self.kind, image)
        return RequestedImage(
            label=line.label,
            prompt=values["prompt"],
            negative_prompt=values.get("negative_prompt") or "",
            seed=seed,
            settings=replace(settings, num_parts=num_parts),
            raw_prompt=line.text,
            image=image,
            mask=mask,
            guides=self.inputs.select_guides(number),
            clip_prompt=values.get("clip_prompt"),
            file_name=values.get("file_name"),
        )


def _warn_of_unused_seeds(line: Line, advice: str) -> None:
    logger.warning("%s: --d has more seeds than are used. %s", line.label, advice)


def _check_has_parts(num_parts: int) -> None:
    """Raise OptionError if a mask without an input image cannot define regions: the prompt has one part."""
    if num_parts == 1:
        raise OptionError(
            "--mask_path is for an image (--image_path) or for a prompt of several parts, but this one has "
            "only one. Write AND between its parts, or omit the mask"
        )


def check_line(options: GenImgOptions, line: Line) -> None:
    """Raise OptionError if a line has errors that can be found without a model."""
    if line.is_from_metadata:  # without options and variants
        return
    read_line_seeds(line.text)  # raises if a seed is not a number
    any_variant = expand(line.text, Random(0))[0]  # all variants have the same options
    values = read_line(any_variant, line.label)
    has_variants = "{" in line.text  # other variants may have other numbers of parts
    if options.prompts.mask_path is not None and not has_variants:
        _check_mask(options, num_parts=len(split_parts(values["prompt"])))
    _select_strengths(with_line(options, values), values)  # raises if --am is not valid


def _check_mask(options: GenImgOptions, num_parts: int) -> None:
    """Raise OptionError if a mask, which repaints an image or marks regions, does not fit the prompt."""
    if options.prompts.image_path is None:  # nothing to repaint: the mask can only mark regions
        _check_has_parts(num_parts)
    if num_parts > 1:
        networks = options.networks
        # LoRAs merged into the weights affect all regions equally
        is_folded = networks.network_pre_calc and networks.num_adjustable > 0
        check_regions(num_parts, networks.num_adjustable, is_folded)


def with_line(options: GenImgOptions, values: Mapping[str, Any]) -> GenImgOptions:
    """Return the options, overridden by those of a prompt line.

    Raises:
        OptionError: If a value is invalid.
    """
    # seeds and multipliers are read elsewhere
    names = {option.key for option in LINE_OPTIONS.values()} - {SEEDS, MULTIPLIERS}
    return override_options(options, {name: value for name, value in values.items() if name in names})


def _select_strengths(options: GenImgOptions, values: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return the LoRA strengths of a prompt line's --am option; None keeps those of the command line."""
    strengths: tuple[float, ...] | None = values.get(MULTIPLIERS)
    if strengths is not None and not options.networks.num_adjustable:
        logger.warning(
            "--am is ignored because there are no --network_weights, or all are folded in permanently"
        )
        return None
    options.networks.check_strengths(strengths or ())
    return strengths


def resolve_settings(
    options: GenImgOptions, values: Mapping[str, Any], kind: ModelKind, image: Path | None
) -> ImageSettings:
    """Return the settings of an image, for a prompt with one part; warn about values without effect.

    Args:
        options: Options of the command line.
        values: Options of the prompt line, from `read_line`; they override `options`.
        kind: Kind of the checkpoint.
        image: The input image; its size is the default. None if there is none.

    Raises:
        OptionError: If a value cannot be used.
    """
    options = with_line(options, values)
    multipliers = _select_strengths(options, values)
    sampling = options.sampling
    width, height = _resolve_size(sampling, kind, image)
    shrink = options.deep_shrink
    gradual = options.gradual_latent
    _warn_of_ignored_options(options, values, kind, has_image=image is not None)
    return ImageSettings(
        width=width,
        height=height,
        steps=sampling.steps,
        scale=sampling.scale,
        negative_scale=sampling.negative_scale,
        strength=DEFAULT_STRENGTH if sampling.strength is None else sampling.strength,
        sizes=sampling.sizes,
        multipliers=multipliers,
        deep_shrink=None if shrink.ds_depth_1 is None else shrink,
        gradual_latent=None if gradual.gradual_latent_timesteps is None else gradual,
    )


def _warn_of_ignored_options(
    options: GenImgOptions, values: Mapping[str, Any], kind: ModelKind, has_image: bool
) -> None:
    """Warn about options without effect: SDXL's sizes, the strength, and options of disabled features."""
    sampling = options.sampling
    if kind is not SDXL and any(size is not None for size in option_values(sampling.sizes).values()):
        logger.warning(
            "Original sizes and crops are ignored because only %s uses them, but this is %s",
            SDXL.title,
            kind.title,
        )
    if sampling.strength is not None and not has_image and options.highres.highres_fix_scale is None:
        logger.warning(
            "--strength is ignored because the image begins with noise. It is for --image_path and "
            "--highres_fix_scale"
        )
    if sampling.scale < 1:
        # Warn about a guidance scale below 1, because in other programs 0 turns guidance off
        effect = "below 1 guidance is off, as at 1"
        if sampling.negative_scale is not None:
            effect = "0 leaves the prompt out, and less than 1 weakens it"
        logger.warning(
            "--scale %g (--l in a prompt): scales count from 1 here; %s; what programs that count from 0 "
            "call %g is %g",
            sampling.scale,
            effect,
            sampling.scale,
            sampling.scale + 1,
        )
    # "dsd1" and "glt": names of --ds_depth_1 and --gradual_latent_timesteps in prompt lines
    if options.deep_shrink.ds_depth_1 is None:
        _warn_if_inactive(values, "dsd1", options.deep_shrink)
    if options.gradual_latent.gradual_latent_timesteps is None:
        _warn_if_inactive(values, "glt", options.gradual_latent)


def _resolve_size(sampling: SamplingOptions, kind: ModelKind, image: Path | None) -> tuple[int, int]:
    """Return width and height: those of the options, else of the input image, else the model's default."""
    if sampling.width is not None and sampling.height is not None:
        return sampling.width, sampling.height
    width, height = (kind.size, kind.size) if image is None else image_size(image)
    # the size of an image is rounded down to multiples that the VAE supports
    return (
        sampling.width or max(width // SIDE, 1) * SIDE,
        sampling.height or max(height // SIDE, 1) * SIDE,
    )


def _warn_if_inactive(
    values: Mapping[str, Any], switch: str, feature: DeepShrinkOptions | GradualLatentOptions
) -> None:
    """Warn about options that have no effect because their feature is not enabled."""
    defaults = option_values(type(feature)())
    on_command_line = [
        f"--{key}"
        for key, value in option_values(feature).items()
        if key not in values and value != defaults[key]
    ]
    in_prompt_line = [
        f"--{short_name}"
        for short_name, option in LINE_OPTIONS.items()
        if short_name != switch and short_name.startswith(switch[:2]) and option.key in values
    ]
    unused = [*on_command_line, *in_prompt_line]
    if unused:
        logger.warning("%s: without --%s, %s does nothing", values["prompt"], switch, " and ".join(unused))


def batches(requests: Iterable[RequestedImage], size: int) -> Iterator[list[RequestedImage]]:
    """Group consecutive images with equal settings and the same kinds of inputs.

    Args:
        requests: The images.
        size: Largest number of images in a group.
    """
    batch: list[RequestedImage] = []
    for request in requests:
        if batch and (len(batch) >= size or _batch_key(batch[0]) != _batch_key(request)):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _batch_key(request: RequestedImage) -> tuple[Any, ...]:
    """Return a key that is equal for images that can share a batch."""
    return (
        request.settings,
        request.image is None,
        request.mask is None,
        len(request.guides),
        request.clip_prompt is None,
    )
