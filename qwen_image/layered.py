"""Qwen-Image-Layered, described for the shared loops: it decomposes an image into transparent layers.

Its latents are L + 1 frames: the whole image generated anew, then its layers from back to front. The input
image stays clean next to them.
"""

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from encoders.pictures import ImageModelFamily, image_defaults, references_in
from modules.errors import CacheError, OptionError
from modules.media.buckets import Size
from modules.media.pixels import from_bytes
from modules.media.reading import image_size
from modules.options import NO_OPTIONS
from protocols.data import (
    CONTROL,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    SamplingDefaults,
    name_text_and_mask,
)
from protocols.family import DitSpec, NoiseSource, NoiseSpec, count_image_tokens
from protocols.inputs import LATENTS
from protocols.requests import (
    NO_MEDIA,
    Prepared,
    Request,
    check_size,
    full_patches,
    keep_usable_media,
    resolve_request,
)
from protocols.rules import NO_GUIDANCE_RULES, GuidanceRules, ModelRelease, SourceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section
from qwen_image.caches import LATENTS_AGAIN, PIXELS, check_batch
from qwen_image.configs import DIT, LAYERED_LATENT, NOISE, PATCH
from qwen_image.files import KEY, QWEN_SETTINGS, VERSIONS, QwenImageFiles
from qwen_image.names import LORA
from qwen_image.options import LAYER_COUNT, LAYERED, MAX_LAYERS, QwenImageReferenceOptions
from qwen_image.references import official_size, read_reference, reference_size

VERSION = VERSIONS[LAYERED]
SIDE = 640  # an image is made as large as the square of this side. Source: the released pipeline
LAYERS = 4  # default number of layers of an image. Source: likewise
NEGATIVE = " "  # default, as released
FEW_TOKENS = 256  # number of tokens up to which noise levels are not shifted. Source: the released pipeline
DEFAULTS = image_defaults(50, 4.0, SIDE, frames=LAYERS, sized_by_images=True)


class ReferenceResize(NamedTuple):
    """How the input image is resized: to `target`, else to about `area` pixels; None keeps its size."""

    area: int | None
    target: Size | None


@dataclass(frozen=True)
class QwenImageLayered(ImageModelFamily):
    """Description of Qwen-Image-Layered for one run, built by the `family_for_...` functions of `family`."""

    files: QwenImageFiles
    options: Any = NO_OPTIONS  # set only in training
    edit: QwenImageReferenceOptions = QwenImageReferenceOptions()
    omits_first_image: bool = False  # the image before the layers is not generated
    keeps_norms: bool = False  # guidance keeps the norm of each token, as in musubi-tuner

    lora_module: str = field(default=LORA[0].network_module, init=False)
    noise: NoiseSpec = field(default=NOISE, kw_only=True)
    dit: DitSpec = field(default=DIT, init=False)
    defaults: SamplingDefaults = field(default=DEFAULTS, init=False)
    text_keys: frozenset[str] = field(default=QWEN_SETTINGS.keys, init=False)
    name: str = field(default=VERSION.name, init=False)
    cache_tag: str = field(default=VERSION.cache_tag, init=False)
    display_name: str = field(default=VERSION.display_name, init=False)
    release: ModelRelease = field(default=VERSION.release, init=False)

    @property
    def latent(self) -> LatentSpec:
        """Return the latent space of the layers, with or without the composite image before them."""
        return replace(LAYERED_LATENT, has_full=not self.omits_first_image)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata."""
        return self.add_file_names(
            {
                "architecture": VERSION.architecture,
                "resolution": f"{SIDE}x{SIDE}",
                "implementation": "https://github.com/QwenLM/Qwen-Image-Layered",
                "model_type": self.name,
            }
        )

    # encoding

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Return what cached latents depend on: the VAE and the range of its input."""
        return {**super().media_identity, **PIXELS}

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return each image's entry: posterior means of the image and its layers, each encoded alone."""
        vae = encoders.vae
        entries = []
        for frames in media.frames:
            encoded = [vae.encode(_to_pixels(frame[None, None])).to(vae.dtype) for frame in frames]
            latents = torch.cat(encoded, dim=2)[0]
            # as musubi-tuner names them
            entries.append([CacheEntry({"latents": latents}, grid=(1, *latents.shape[2:]))])
        return entries

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the text states, and the input images, which are the first latent frames.

        Raises CacheError for texts of another release, and for images without layers.
        """
        check_batch(batch, VERSION, self.files)
        if latents.shape[2] == 1:
            raise CacheError(
                f"{batch.keys[0]}: its cache has an image without layers. Give its table multiple_target = "
                f"true, and cache again with {LATENTS_AGAIN}"
            )
        return {KEY: batch.tensors[KEY], CONTROL: latents[:, :, :1]}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C F H W float32.

        If the first frame is given (`Overrides.num_clean_frames`), it is the input image: the network does
        not see it among the noisy frames, and its velocity is 0.

        `cond` contains:
            vl_embed: States of the language model, T D for each sample.
            latents_control: Clean latents of the input image, B C 1 h w.
        """
        num_input_frames = overrides.num_clean_frames
        velocity: Tensor = dit(
            noisy[:, :, num_input_frames:],
            timesteps.float(),
            **name_text_and_mask(cond, "text", KEY, noisy.device),
            overrides=overrides.rename_nag(lambda text: name_text_and_mask(text, "text", KEY, noisy.device)),
            references=references_in(cond, noisy.device),
        )
        if num_input_frames:
            velocity = torch.cat([torch.zeros_like(velocity[:, :, :1]), velocity], dim=2)
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request to split an image; by default, the image's size sets the flow shift.

        Raises OptionError unless there is exactly one image, and for an invalid number of layers.
        """
        self.files.check()
        # The request with only the image to split into layers; warn about media that are ignored
        usable_media = {**NO_MEDIA, "control_images": True}
        request = keep_usable_media(request, usable_media, f"{self.display_name} does not take it")
        if len(request.control_images) != 1:
            raise OptionError(
                f"--control_image_path (--ci in a prompt line): {len(request.control_images)} images, but "
                f"{self.display_name} decomposes one image. Pass exactly one"
            )
        (path,) = request.control_images
        source_size = image_size(path)
        area = None
        if request.width is None and request.height is None:
            area = SIDE**2  # of the image and its layers, as released
            width, height = official_size(source_size, area)
            request = replace(request, width=width, height=height)
        width, height = full_patches(request.width or SIDE, request.height or SIDE, self.latent)
        # layers are frames; the image itself is an additional first frame, unless only layers are generated
        size = width, height, self._count_layers(request) + self.latent.has_full
        check_size(size, self.latent)
        # the input image is resized to the target, or to the area, before it is encoded
        target = (width, height) if self.edit.resize_control_to_image_size else None
        resize = ReferenceResize(area, target)
        flow_shift = request.flow_shift
        if flow_shift is None:
            flow_shift = self._compute_flow_shift(reference_size(source_size, resize.area, resize.target))
        prepared = resolve_request(
            request, self.defaults, size=size, flow_shift=flow_shift, default_negative=NEGATIVE
        )
        rules = GuidanceRules(norm_patch_size=PATCH) if self.keeps_norms else NO_GUIDANCE_RULES
        name_suffix = f"_{path.stem}" if self.edit.append_original_name else ""
        return replace(prepared, rules=rules, output_suffix=name_suffix, family_settings=resize)

    def _compute_flow_shift(self, size: tuple[int, int]) -> float:
        """Return the flow shift for an input image that is resized to `size` (width, height)."""
        width, height = size
        return math.sqrt(count_image_tokens(self.latent.shape(1, height, width)) / FEW_TOKENS)

    def _count_layers(self, request: Request) -> int:
        """Return the number of layers, from the sample of a training run, the prompt line or the option."""
        text = request.extra.get(LAYER_COUNT)
        count = int(text) if text is not None else request.frames or LAYERS
        if not 1 <= count <= MAX_LAYERS:
            raise OptionError(
                f"--{LAYER_COUNT} {count} (--f in a prompt line): pass 1 to {MAX_LAYERS} layers"
            )
        return count

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the input image as its posterior mean, 1 C 1 h w, for section 0, the only one."""
        (path,) = prepared.request.control_images
        taken: ReferenceResize = prepared.family_settings
        frame = read_reference(path, taken.target, area=taken.area, has_alpha=True)
        return {0: {CONTROL: encoders.vae.encode(_to_pixels(frame[None, None]))}}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section; its noise is drawn at once, layer by layer, as in the released pipeline."""
        _, channels, frames, height, width = self.latent.shape(
            prepared.frames, prepared.height, prepared.width
        )
        # one draw, layer after layer, as the released pipeline
        drawn = noise.draw((1, frames, channels, height, width), self._noise_dtype).float()
        return (yield prompts[0].section(drawn.transpose(1, 2).contiguous(), inputs.get(0)))

    @property
    def source(self) -> SourceRules:
        """Return what denoising may start from: saved latents of this model only."""
        return SourceRules((LATENTS,), self.display_name, False, self.same_latents)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield the image and its layers, 1 4 1 H W each, each decoded alone."""
        for frame in latents.split(1, dim=2):
            yield from encoders.vae.decode(frame)


def _to_pixels(frames: Tensor) -> Tensor:
    """Convert RGBA frames, B F H W 4 uint8, to B 4 F H W float32 in -1..1."""
    return from_bytes(frames.movedim(-1, 1))
