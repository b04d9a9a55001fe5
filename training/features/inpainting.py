"""Train an inpainting model, which repaints the masked part of an image: --train_inpainting.

In addition to the noisy latents, the network gets the mask and the latents of the image without its masked
part. Each step has new masks, so images are encoded at each step, as with color_aug and random_crop.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeGuard, cast

from modules.errors import OptionError
from modules.options import HABIT, IDENTITY, option
from training.features.contract import (
    AT_NOISE,
    LIVE_MEDIA,
    NO_DATASET,
    Feature,
    FeatureOptions,
    given_values,
)
from training.features.hooks import RunFeatures

if TYPE_CHECKING:
    import torch

    from dataset.sources.decoding import DecodedMedia
    from protocols.data import MediaEncoders
    from protocols.family import Caches, Described, Family

SWITCH = "--train_inpainting"


class Inpaints(Protocol):
    """A model family with an inpainting variant, whose inputs include a mask and a masked image."""

    def for_inpainting(self) -> "Family":
        """Return a copy of this family that uses the inpainting variant of its network."""
        ...

    def encode_masked(
        self,
        encoders: "MediaEncoders",
        pixels: "torch.Tensor",
        mask: "torch.Tensor",
        generator: "torch.Generator",
    ) -> "dict[str, torch.Tensor]":
        """Return the additional inputs of the network for an image: its mask, and the masked image's latents.

        Args:
            encoders: The loaded VAE.
            pixels: The image, 1 C H W, -1..1.
            mask: H W; pixels that are not 0 are repainted.
            generator: Random generator for sampling from the VAE's posterior.
        """
        ...


def _can_inpaint(family: "Described") -> TypeGuard[Inpaints]:
    return family.abilities.inpaints


class InpaintingOptions(FeatureOptions, title="inpainting", at=AT_NOISE):
    """Options of training an inpainting model, such as the share of an image that masks hide."""

    train_inpainting: bool = option(
        "train an inpainting model, which repaints what a mask marks. Masks are random, or those of "
        "mask_directory",
        facts=IDENTITY,
    )
    inpainting_full_mask_rate: float = option(
        "fraction of the steps in which the mask is the whole image",
        default=0.0,
        minimum=0,
        maximum=1,
        needs="train_inpainting",
        hint="0.25 keeps images from text alone; released models were trained so",
        facts=HABIT,
    )


def add_inputs(
    options: InpaintingOptions,
    masks_weight_loss: bool,
    family: "Caches",
    encoders: "MediaEncoders",
    image: "DecodedMedia",
    key: str,
    tensors: "Mapping[str, torch.Tensor]",
) -> "dict[str, torch.Tensor]":
    """Add the mask of an inpainting model, and the latents of the masked image, to an image's tensors.

    Args:
        options: Options of the run.
        masks_weight_loss: Whether masks of the dataset weight the loss; else they mark what to repaint.
        family: The model family.
        encoders: The loaded VAE.
        image: The image, cropped and mirrored.
        key: Seed of the mask, different at each step.
        tensors: Tensors of the image.
    """
    import random

    import torch  # this and the following imports are not needed for --help

    from modules.media.pixels import to_pixels
    from modules.media.random_masks import draw_mask
    from modules.seeds import derive_seed
    from protocols.data import LOSS_MASK
    from training.data.feed import seed_generator

    assert _can_inpaint(family)  # `_use_inpainting_variant` has checked this
    rng = random.Random(derive_seed("inpainting", key))
    repaints_all = rng.random() < options.inpainting_full_mask_rate
    kept_tensors = dict(tensors)
    weights_loss = masks_weight_loss or image.source.table.source.alpha_mask
    if image.mask is not None and not weights_loss:  # the dataset's mask is the part to repaint
        del kept_tensors[LOSS_MASK]
        mask = image.mask[0] >= 128  # mid-gray or lighter
    else:
        _, height, width, _ = image.frames.shape
        mask = draw_mask(height, width, rng)
    if repaints_all:
        mask[:] = True
    # frames 1 H W C -> a batch of one clip, 1 C 1 H W -> pixels 1 C H W
    pixels = to_pixels(torch.from_numpy(image.frames[..., :3])[None])[:, :, 0]
    posterior_generator = seed_generator("posterior", f"{key} masked")
    return kept_tensors | family.encode_masked(encoders, pixels, torch.from_numpy(mask), posterior_generator)


def _use_inpainting_variant(run: RunFeatures, family: "Family") -> "Family":
    """Return the family's variant with inputs for inpainting; raise OptionError if it cannot be trained."""
    if NO_DATASET in run.needs:
        raise OptionError(f"{SWITCH} hides parts of images, and LECO learns without images. Omit it")
    from protocols.family_networks import get_custom_network  # torch: only with this feature

    if not _can_inpaint(family):
        raise OptionError(
            f"{SWITCH} is for Stable Diffusion 1, 2 and XL, and this script trains {family.name}. Omit it"
        )
    custom = get_custom_network(cast("Described", family))
    if custom is not None and not custom.in_text_encoders:
        raise OptionError(
            f"{SWITCH} is for LoRAs, textual inversion and whole checkpoints, and this script trains "
            f"{custom.label}. Omit it"
        )
    return family.for_inpainting()


def _join(run: RunFeatures, options: InpaintingOptions) -> None:
    """Register --train_inpainting: a run learns to repaint masked parts of images, encoded each step."""
    caching = run.options.caching
    if caching is not None and caching.caches_latents:
        flag = "--cache_latents_to_disk" if caching.cache_latents_to_disk else "--cache_latents"
        raise OptionError(
            f"{flag} with {SWITCH}: each step hides a different part of an image, which the VAE encodes in "
            "that step. Omit one of the two"
        )
    subset = run.options.subset
    # with --masked_loss the dataset's masks weight the loss; otherwise they select what is repainted
    masks_weight_loss = subset is not None and subset.masked_loss
    if not masks_weight_loss:
        run.mask_input_option = SWITCH
    has_masks = not masks_weight_loss and any(table.source.mask_directory for table in run.tables)
    masks = "those of mask_directory, random ones elsewhere" if has_masks else "random ones"
    run.info.at_start["inpainting"] = f"masks: {masks}"
    run.info.in_files |= given_values(options)
    run.needs.add(LIVE_MEDIA)
    run.on.family.append(partial(_use_inpainting_variant, run))
    run.on.media.append(partial(add_inputs, options, masks_weight_loss))


INPAINTING = Feature(
    name="inpainting",
    options=InpaintingOptions,
    is_on=lambda options: options.train_inpainting,
    join=_join,
)
