"""The control of VACE models as 96 channels: a video, a mask of the generated area, and reference images.

16 channels are the latents of the unchanged area, 16 those of the changed area, 64 the mask: the 8 x 8 pixels
of a latent pixel are channels. Without a mask the whole video is a guide, such as a depth or pose video. Each
reference is a latent frame before the clip, also in the noise; it is cut off at the end. Source: the released
code (ali-vilab/VACE) and diffusers' WanVACEPipeline, whose order of references is kept: the first one is next
to the clip.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from modules.errors import OptionError
from modules.media.pixels import image_pixels, image_size, video_pixels
from modules.option_values import to_path
from protocols.requests import Prepared, Request, check_opens
from wan.options import MASK, MAX_HINT_SCALE, MAX_REFERENCES, SCALE
from wan.spec import LATENT
from wan.vae import WanVae

logger = logging.getLogger(__name__)

_DEFAULT_SCALES = ("1", "1.0")  # values of --vace_scale that equal its default
SAME_SHAPE = 0.05  # tolerance for the aspect ratio of a mask, because sides are rounded
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # suffixes of masks that are used for all frames


@dataclass(frozen=True)
class VaceRequest:
    """VACE's inputs of a request other than its video and its references."""

    mask: Path | None
    scales: tuple[float, ...]  # strength of each layer's hints

    def add_to(self, prepared: Prepared) -> Prepared:
        """Return the prepared request with these settings, which are also recorded in its files' metadata.

        Raises:
            OptionError: If the mask has neither the aspect ratio of its clip nor the result's, or has
                no white pixels.
            MediaError: If the mask is too short.
        """
        metadata = dict(prepared.extra_metadata)
        if self.mask is not None and prepared.request.control_path is not None:
            metadata["src_mask_path"] = str(self.mask)
            # Raise OptionError if a mask has neither the aspect ratio of its clip nor the result's
            clip = prepared.request.control_path
            width, height = image_size(self.mask)
            clip_width, clip_height = image_size(clip)
            aspect = width / height
            aspects = [clip_width / clip_height, prepared.width / prepared.height]
            if min(abs(other / aspect - 1) for other in aspects) > SAME_SHAPE:
                raise OptionError(
                    f"--src_mask {self.mask} has {width} x {height} pixels, --src_video {clip} "
                    f"{clip_width} x {clip_height}: the two would not match. Pass a mask of the clip's size"
                )
            # raises if the mask cannot be used
            read_mask(self.mask, prepared.width, prepared.height, prepared.frames)
        # 1.0 is the default; one number is used for all layers if their scales are equal
        if set(self.scales) != {1.0}:
            scales = self.scales if len(set(self.scales)) > 1 else self.scales[:1]
            metadata["vace_scale"] = ", ".join(f"{scale:g}" for scale in scales)
        return replace(prepared, family_settings=self, extra_metadata=metadata)


def read_vace_request(request: Request, layers: int) -> tuple[Request, VaceRequest]:
    """Return the request with its reference images as a list of paths, and VACE's settings.

    `layers` is the number of VACE's blocks. Raises OptionError if a file is missing or unused.
    """
    # Raise OptionError if a start or end image is given, which VACE does not take
    unusable = {"image_path": request.image_path, "end_image_path": request.end_image_path}
    for option, path in unusable.items():
        if path is not None:
            raise OptionError(
                f"--{option} {path}: VACE has no such input. To keep a first or last frame give --src_video "
                "a clip that has it, gray elsewhere, and --src_mask one that is black there and white "
                "elsewhere; to show what something looks like, pass the image to --src_ref_images"
            )
    references = split_comma_paths(request.control_images)  # an option may list several, with commas
    mask = _read_mask_path(request)
    if len(references) > MAX_REFERENCES:
        raise OptionError(f"{len(references)} reference images: use at most {MAX_REFERENCES}")
    if references and request.source is not None:
        raise OptionError(
            f"--{request.source.option} {request.source.path} with reference images, which are placed "
            "before the clip: omit one of them, or pass the video to --src_video"
        )
    _check_images(mask, references)
    # a control is optional, because VACE also generates from text alone
    scale = request.extra.get(SCALE, "1")
    if request.control_path is None and not references and request.source is None:
        unused_scale = "" if scale in _DEFAULT_SCALES else f"--vace_scale {scale} has no effect: "
        logger.warning(
            "%sneither --src_video nor --src_ref_images is given: the video is generated from the text alone",
            unused_scale,
        )
    settings = VaceRequest(mask, read_scales(scale, layers))
    return replace(request, control_images=references), settings


def _read_mask_path(request: Request) -> Path | None:
    """Return the path of --src_mask; raise OptionError if it is given without a video."""
    if not request.extra.get(MASK):
        return None
    mask = to_path("--src_mask", request.extra[MASK])
    if request.control_path is None:
        raise OptionError(
            f"--src_mask {mask}: it marks which parts of a video are regenerated, but there is no video. "
            "Pass --src_video"
        )
    return mask


def _check_images(mask: Path | None, references: Sequence[Path]) -> None:
    """Raise OptionError if the mask or a reference cannot be opened, or a reference is too small."""
    if mask is not None:
        check_opens(MASK, mask, is_image=mask.suffix.lower() in IMAGES)
    for path in references:
        check_opens("src_ref_images", path, is_image=True)
        if min(image_size(path)) < LATENT.stride[1]:
            raise OptionError(
                f"--src_ref_images {path}: nothing can be seen in so few pixels. Use a larger one"
            )


def split_comma_paths(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Split paths at commas, as the release does, except for a path that exists with its comma."""
    words = []
    for path in paths:
        words += [str(path)] if path.exists() else str(path).split(",")
    return tuple(Path(word.strip()) for word in words if word.strip())


def read_scales(text: str, layers: int) -> tuple[float, ...]:
    """Parse one scale for all layers, or one for each. Raises OptionError for another number of scales."""
    numbers = text.replace(",", " ").split()
    try:
        scales = tuple(map(float, numbers))
        if not all(abs(scale) <= MAX_HINT_SCALE for scale in scales):  # False for NaN, too
            raise ValueError
    except ValueError:
        raise OptionError(
            f"--vace_scale {' '.join(numbers)}: use a number of at most {MAX_HINT_SCALE}, or one a layer"
        ) from None
    if len(scales) not in (1, layers):
        raise OptionError(
            f"--vace_scale {' '.join(numbers)}: VACE has {layers} layers. Pass one number, or {layers}"
        )
    return scales * layers if len(scales) == 1 else scales


def encode_control(vae: WanVae, prepared: Prepared) -> dict[str, Tensor | list[Tensor]]:
    """Encode VACE's inputs, `vace_control` and `vace_scales`, on the CPU.

    `vace_control`, 1 96 K+L h w, has the latents of K reference images before the L latent frames.
    `vace_scales` has a scale for each VACE layer. The result is empty if all scales are 0, because no hints
    are computed then. Raises MediaError if a video is too short.
    """
    # imported here, because the network itself does not need the media libraries
    from modules.media.canvas import composite_on_white
    from modules.media.reading import first_frame

    request = prepared.request
    settings = prepared.family_settings
    assert isinstance(settings, VaceRequest)
    if not any(settings.scales):
        return {}
    width, height, frames = prepared.width, prepared.height, prepared.frames
    # without a video the control is gray (0 in -1..1), and without a mask all pixels are generated
    pixels = torch.zeros(1, 3, frames, height, width)
    mask = torch.ones(1, 1, frames, height, width)
    if request.control_path is not None:
        pixels = video_pixels(request.control_path, "--src_video", width=width, height=height, frames=frames)
    if settings.mask is not None:
        mask = read_mask(settings.mask, width, height, frames)
    vace_latents = encode_inactive_and_reactive(vae, pixels, mask).cpu()
    images = [first_frame(path) for path in request.control_images]
    references = [vae.encode(composite_on_white(image, width, height)).cpu() for image in images]
    control = stack_control(vace_latents, fold_mask(mask), references)
    return {"vace_control": control, "vace_scales": torch.tensor([settings.scales])}


def read_mask(path: Path, width: int, height: int, frames: int) -> Tensor:
    """Read a mask of the pixels to generate, 1 1 F H W: white, which is 1, is generated, black is kept.

    A single image is used for all frames. Raises OptionError if no pixel is white.
    """
    if path.suffix.lower() in IMAGES and path.is_file():
        pixels = image_pixels(path, width, height).expand((-1, -1, frames, -1, -1))
    else:
        pixels = video_pixels(path, "--src_mask", width=width, height=height, frames=frames)
    mask = ((pixels[:, :1] + 1) / 2).clamp(0, 1)
    if not bool((mask > 0.5).any()):
        raise OptionError(f"--src_mask {path}: it is black. Paint the parts to generate white, or omit it")
    return mask


def encode_inactive_and_reactive(vae: WanVae, pixels: Tensor, mask: Tensor) -> Tensor:
    """Return the latents of the pixels to keep, then of the pixels to change: B 32 L h w.

    In each half, all other pixels are gray.

    Args:
        vae: The VAE.
        pixels: Clip, B 3 F H W in -1..1.
        mask: B 1 F H W, above 0.5 where the clip changes.
    """
    changes = (mask > 0.5).to(pixels)
    return torch.cat([vae.encode(pixels * (1 - changes)), vae.encode(pixels * changes)], dim=1)


def fold_mask(mask: Tensor) -> Tensor:
    """Turn a mask, B 1 F H W, into B 64 L h w: the pixels of a latent pixel become channels, row by row.

    Mask values are not rounded: the release applies the threshold of 0.5 to the clip alone. As in the
    release, the frames nearest to the middles of L equal parts are used, although the first latent frame
    contains only one frame.
    """
    step, rows, columns = LATENT.stride
    frames = (mask.shape[2] - 1) // step + 1
    folded = rearrange(mask, "b 1 f (h r) (w c) -> b (r c) f h w", r=rows, c=columns)
    return functional.interpolate(folded, size=(frames, *folded.shape[3:]), mode="nearest-exact")


def stack_control(vace_latents: Tensor, mask: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Concatenate VACE's control latents and mask to B 96 K+L h w; reference images get a mask of 0.

    Args:
        vace_latents: Latents of the unchanged parts, then of the parts to change, B 32 L h w.
        mask: Folded mask, B 64 L h w.
        references: K latents, B 16 1 h w each. They come before the clip, the last one first.
    """
    control = torch.cat([vace_latents, mask.to(vace_latents)], dim=1)
    fronts = []
    for reference in references:
        missing = control.shape[1] - reference.shape[1]  # channels
        fronts.append(functional.pad(reference.to(control), (0, 0, 0, 0, 0, 0, 0, missing)))
    return torch.cat([*reversed(fronts), control], dim=2)
