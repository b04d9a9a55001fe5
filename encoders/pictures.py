"""The base class of families of image models, reference images, and preview colors of FLUX's latents."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from encoders.autoencoder import load_autoencoder, read_autoencoder_header
from encoders.files import OneTransformer, TransformerFiles
from encoders.tiles import posterior_generator
from modules.control_codes import shorten
from modules.devices import send, send_ahead
from modules.errors import CacheError, DatasetError, OptionError
from modules.media.buckets import fit_within
from modules.media.pixels import byte_clips, to_pixels
from protocols.data import (
    CONTROL,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    MomentsBatch,
    MomentsRules,
    SamplingDefaults,
)
from protocols.families import list_same_latents
from protocols.family import NoiseSource
from protocols.inputs import IMAGE, LATENTS
from protocols.requests import (
    NO_MEDIA,
    Prepared,
    Prompt,
    Prompts,
    Request,
    check_size,
    full_patches,
    get_size,
    keep_usable_media,
    resolve_request,
)
from protocols.rules import ReferenceRules, SourceRules
from protocols.steps import EncodedPrompts, Section

logger = logging.getLogger(__name__)

GUIDANCE = "guidance"  # key of the embedded guidance in conditions
# least-squares fit of colors (R, G, B) to FLUX's latents in model space; the values that other tools use too
PREVIEW_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
PREVIEW_BIAS = (-0.0329, -0.0718, -0.0851)
NO_MOMENTS = MomentsRules(rejection="the model makes images, not clips")


@dataclass(frozen=True)
class AutoencoderFiles(TransformerFiles):
    """Model files of a family with FLUX's autoencoder."""

    dit_option: str = "--pretrained_model_name_or_path"

    vae_option: ClassVar[str] = "--ae"
    vae_folder: ClassVar[str] = "vae"

    def load_vae(self, device: torch.device) -> Any:
        """Load FLUX's autoencoder with the options' dtype and tile size."""
        return load_autoencoder(self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Check by its header that the VAE file is FLUX's autoencoder."""
        read_autoencoder_header(self.vae_path, self.vae_option)


def encode_images(
    media: MediaBatch, device: torch.device, encode: Callable[[Tensor], Tensor]
) -> list[list[CacheEntry]]:
    """Return one cache entry for each image, with the latents of its references as `latents_control_0`, ...

    `encode` maps pixels, B 1 H W 3 uint8, to latents, B C 1 h w.
    """
    entries = []
    for part in media.split_for(device):  # a CPU encodes items one at a time
        batch_latents = {"latents": encode(part.frames)}
        for number, reference_frames in enumerate(part.control):  # control images are the references
            batch_latents[f"{CONTROL}_{number}"] = encode(reference_frames)
        for index in range(len(part.frames)):
            tensors = {name: latents[index].clone() for name, latents in batch_latents.items()}
            entries.append([CacheEntry(tensors)])
    return entries


def get_references(batch: Batch, channels: int, patch: int, remedy: str) -> dict[str, Tensor]:
    """Return the latents of a batch's reference images, each B C 1 h w, by their names in caches.

    Args:
        batch: The batch.
        channels: Number of latent channels.
        patch: Edge length of a token in latent pixels.
        remedy: Command that caches again, for messages.

    Raises:
        CacheError: If latents have an unexpected shape.
    """
    references = {name: batch.tensor(name) for name in batch.tensors if name.startswith(CONTROL)}
    sides = " with even sides" if patch > 1 else ""
    for name, tensor in references.items():
        height, width = tensor.shape[-2:]
        # an image is one frame, and whole tokens cover it
        if tensor.shape[1:-2] != (channels, 1) or height % patch or width % patch:
            raise CacheError(
                f"{batch.keys[0]}: {name} in its cache is {'x'.join(map(str, tensor.shape[1:]))}, not "
                f"{channels} channels of one image{sides}. Cache again with {remedy}."
            )
    return references


def references_in(cond: Conditions, device: torch.device) -> list[Tensor]:
    """Return the reference images' latents in the conditions, in order, on the device."""

    def index_of(name: str) -> int:  # sorted as integers, because as strings 10 would precede 2
        return int(name.removeprefix(CONTROL).lstrip("_") or 0)

    names = sorted((name for name in cond if name.startswith(CONTROL)), key=index_of)
    values = [cond[name] for name in names]
    return [send(value, device) for value in values if isinstance(value, Tensor)]


def read_reference(path: Path, area: int | None, step: int) -> Tensor:
    """Read a reference image, 1 1 H W 3 uint8, and shrink it to at most `area` pixels; None keeps the size.

    The image is center-cropped so that its sides are multiples of `step`, as in FLUX.2's released code.
    """
    from modules.media.reading import fit_frame, read_image

    frame = read_image(path)
    height, width = frame.shape[:2]
    fit = fit_within((width, height), area, step)
    return torch.from_numpy(fit_frame(frame, fit)[None, None].copy())


def show_references(prepared: Prepared, size: tuple[int, int] | None = None) -> Prepared:
    """Return the request with its reference images added to all prompts.

    `size` becomes `Prompt.image_size`, the size at which the text encoder sees the images.
    """
    paths = prepared.request.control_images
    prompt_set = prepared.prompts[0]  # an image has a single section

    # without a negative prompt, guidance compares with an empty text and the same images
    def with_images(prompt: Prompt | None) -> Prompt:
        return replace(prompt or Prompt(""), images=paths, image_size=size)

    prompts = Prompts(
        with_images(prompt_set.positive),
        negative=with_images(prompt_set.negative),
        blank=with_images(prompt_set.blank),
        nag=None if prompt_set.nag is None else with_images(prompt_set.nag),
    )
    return replace(prepared, prompts={0: prompts})


def guidance_in(cond: Conditions, device: torch.device) -> Tensor | None:
    """Return the guidance scale to embed, B float32 on the device; None if the conditions contain none."""
    guidance = cond.get(GUIDANCE)
    return send_ahead(guidance, device).float() if isinstance(guidance, Tensor) else None


class ImageModelFamily(OneTransformer):
    """Base class of image model families."""

    moments: MomentsRules = NO_MOMENTS
    to_edit: ClassVar[str] = "remove them"  # advice about control images that the model does not take
    # cached latents are samples of the VAE's posterior; False: its mean
    draws_latents: ClassVar[bool] = True
    # the VAE is a video VAE: it takes pixels of -1..1 instead of bytes, and decodes in chunks
    vae_takes_clips: ClassVar[bool] = False
    noise_dtype: torch.dtype | None = None  # dtype of drawn noise; None: the dtype of the transformer

    if TYPE_CHECKING:  # a dataclass that inherits a property takes it as the default of its field

        @property
        @abstractmethod
        def name(self) -> str:
            """Name of the family."""

        @property
        @abstractmethod
        def display_name(self) -> str:
            """The model's name for messages."""

        @property
        @abstractmethod
        def latent(self) -> LatentSpec:
            """The latent space of the VAE."""

        @property
        @abstractmethod
        def defaults(self) -> SamplingDefaults:
            """Default values for requests that do not set them."""

    # encoding

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has clips or control images."""
        if table.kind != "image":
            raise DatasetError(
                f"{table.name}: the table has clips, and {self.display_name} can only learn images. Set "
                "image_directory or image_jsonl_file, or train a video model."
            )
        if table.has_control and self.references is None:
            raise DatasetError(
                f"{table.name}: the table has control images, which {self.display_name} cannot take: "
                f"{self.to_edit}."
            )

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return one cache entry per image.

        Latents are posterior samples in float32, seeded with the image's name. If `draws_latents` is False,
        they are posterior means, which latents of reference images always are.
        """
        entries = []
        vae = encoders.vae
        if not self.draws_latents:
            return encode_images(media, vae.device, lambda frames: vae.encode(byte_clips(frames)))
        for part in media.split_for(vae.device):
            latents = vae.encode(byte_clips(part.frames), [posterior_generator(key) for key in part.keys])
            entries += [[CacheEntry({"latents": latent.clone()})] for latent in latents]
        return entries

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        """Raise AssertionError: `NO_MOMENTS` has already rejected dataset tables with moments."""
        raise AssertionError(NO_MOMENTS.rejection)

    # generation

    def resolve_image(self, request: Request, flow_shift: float, negative: str = "") -> Prepared:
        """Check the model files and resolve an image request: fill in defaults, round the size to patches.

        `flow_shift` and `negative` (the negative prompt) are the model's defaults.
        """
        self.files.check()
        request = self.keep_media(request, self.display_name)
        width, height, _ = get_size(request, self.defaults)
        size = *full_patches(width, height, self.latent), 1
        check_size(size, self.latent)
        shift = flow_shift if request.flow_shift is None else request.flow_shift
        return resolve_request(request, self.defaults, size=size, flow_shift=shift, default_negative=negative)

    def keep_media(self, request: Request, model_name: str) -> Request:
        """Return the request without media that the model does not take, with warnings that name the model.

        Raises:
            OptionError: If the model takes reference images, but the request's images are unusable.
        """
        rules = self.references
        accepts_references = rules is not None
        usable_by_field = {**NO_MEDIA, "control_images": accepts_references}
        request = keep_usable_media(request, usable_by_field, f"{model_name} does not take it")
        if rules is None:
            return request
        if request.control_images:
            _check_references(request.control_images, rules, model_name)
        elif rules.edits_images:
            logger.warning(
                "%s edits images, but %r has none to edit (--control_image_path, --ci in a prompt line): "
                "the image is made from the text alone",
                model_name,
                shorten(request.prompt, 60),
            )
        return request

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether the request has control images, the only media input of this network."""
        return bool(prepared.request.control_images)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Return no conditions: by default, an image depends on text alone."""
        return {0: {}}

    @property
    def same_latents(self) -> frozenset[str]:
        """Other families whose latent caches are compatible because they use the same autoencoder."""
        return list_same_latents(self.name)

    @property
    def source(self) -> SourceRules:
        """Rules for starting from an image or from a latent file instead of noise."""
        return SourceRules((IMAGE, LATENTS), self.display_name, False, self.same_latents)

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode an image, 1 1 H W 3 uint8, to latents in model space, 1 C 1 h w.

        `seed` is used if latents are samples of the posterior.
        """
        clips = to_pixels(frames) if self.vae_takes_clips else byte_clips(frames)
        vae = encoders.vae
        latents: Tensor
        latents = vae.encode(clips, [posterior_generator(seed)]) if self.draws_latents else vae.encode(clips)
        return latents * self.latent.scale

    def draw_noise(self, prepared: Prepared, noise: NoiseSource) -> Tensor:
        """Return an image's initial noise, 1 C 1 h w float32."""
        shape = self.latent.shape(1, prepared.height, prepared.width)
        return noise.draw(shape, self._noise_dtype).float()

    @property
    def _noise_dtype(self) -> torch.dtype:
        return self.noise_dtype or self.files.compute_dtype() or torch.float32

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield an image's only run of the denoising loop, with embedded guidance if the model takes it."""
        conditions = dict(inputs.get(0, {}))
        if prepared.embedded_guidance is not None:
            conditions[GUIDANCE] = torch.tensor([prepared.embedded_guidance])
        return (yield prompts[0].section(self.draw_noise(prepared, noise), conditions))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents to pixels, 1 C F H W, in one chunk or, for a video VAE, several."""
        decoded = encoders.vae.decode(latents)
        yield from decoded if self.vae_takes_clips else (decoded,)


def _check_references(paths: Sequence[Path], rules: ReferenceRules, model_name: str) -> None:
    """Raise OptionError if there are too many reference images, or if one is too small."""
    from modules.media.reading import image_size  # only with reference images

    option = "--control_image_path (--ci in a prompt line)"
    if len(paths) > rules.max_references:
        raise OptionError(
            f"{option}: {len(paths)} reference images, but {model_name} takes {rules.max_references} at "
            f"most. Omit {' '.join(map(str, paths[rules.max_references :]))}"
        )
    for path in paths:
        width, height = image_size(path)
        if min(width, height) < rules.step:  # the image would be cropped to multiples of the step: to nothing
            raise OptionError(
                f"{option} {path}: {width} x {height} pixels are too few, each side needs at least "
                f"{rules.step}. Use a larger image."
            )


def image_defaults(
    steps: int, guidance_scale: float, side: int, flow_shift: float | None = None, **changes: Any
) -> SamplingDefaults:
    """Return sampling defaults for square images and Euler's method.

    Args:
        steps: Number of sampling steps.
        guidance_scale: Scale of classifier-free guidance.
        side: Width and height in pixels.
        flow_shift: Shift of the sigmas; None lets the family compute it.
        changes: Further fields of `SamplingDefaults`.
    """
    defaults = SamplingDefaults(
        steps=steps,
        fps=1.0,
        guidance_scale=guidance_scale,
        embedded_guidance=None,
        flow_shift=flow_shift,
        solver="euler",
        width=side,
        height=side,
        frames=1,
    )
    return replace(defaults, **changes)
