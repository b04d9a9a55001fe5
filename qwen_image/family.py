"""Qwen-Image, described for the shared loops."""

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from encoders.pictures import (
    ImageModelFamily,
    encode_images,
    get_references,
    image_defaults,
    references_in,
)
from modules.errors import OptionError
from modules.flow.schedule import size_shift
from modules.media.pixels import to_pixels
from modules.options import NO_OPTIONS
from modules.speed_options import VAE_TILE
from protocols import family
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
from protocols.requests import Prepared, Request
from protocols.rules import (
    GuidanceRules,
    ModelRelease,
    ReferenceRules,
)
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section
from qwen_image.caches import LATENTS_AGAIN, PIXELS, check_batch
from qwen_image.configs import DIT, LATENT, NOISE, PATCH
from qwen_image.files import (
    KEY,
    QWEN_SETTINGS,
    VERSIONS,
    QwenImageFiles,
    QwenImageReleaseFiles,
    Version,
    make_model_files,
)
from qwen_image.layered import QwenImageLayered
from qwen_image.names import LORA
from qwen_image.options import (
    LAYER_COUNT,
    MASK,
    ORIGINAL,
    QwenImageGenerationOptions,
    QwenImageLatentCachingOptions,
    QwenImageReferenceOptions,
    QwenImageTextCachingOptions,
    QwenImageTrainingOptions,
)
from qwen_image.references import (
    AS_TRAINED,
    add_reference_images,
    fill_size,
    find_area,
    read_edit_reference,
    read_reference,
)

if TYPE_CHECKING:
    from protocols.workflows import ComfyModel

logger = logging.getLogger(__name__)

NEGATIVE = " "  # default, as released
SOLVER = "euler-terminal"  # Euler's steps, at the noise levels of the release
DEFAULTS = image_defaults(25, 4.0, 1328, extras=(MASK,))
# how far the schedule is shifted, by the number of tokens of an image: exp(mu), mu on a line through these.
# Source: the release's scheduler
SHIFT_AT_FEW_TOKENS, SHIFT_AT_MANY_TOKENS = (256, 0.5), (8192, 0.9)


@dataclass(frozen=True)
class QwenImage(ImageModelFamily):
    """Description of Qwen-Image for one run, built by the `family_for_...` functions below."""

    files: QwenImageFiles
    version: Version = VERSIONS[ORIGINAL]
    options: Any = NO_OPTIONS  # set only in training
    edit: QwenImageReferenceOptions = AS_TRAINED

    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: family.NoiseSpec = field(default=NOISE, init=False)
    dit: family.DitSpec = field(default=DIT, init=False)
    defaults: SamplingDefaults = field(default=DEFAULTS, init=False)
    text_keys: frozenset[str] = field(default=QWEN_SETTINGS.keys, init=False)

    @property
    def name(self) -> str:
        """Return the architecture's name in caches and saved files, which depends on the release."""
        return self.version.name

    @property
    def cache_tag(self) -> str:
        """Return the suffix of cache file names, which depends on the release."""
        return self.version.cache_tag

    abilities: ClassVar = family.Abilities(detects_few_steps=True, has_comfy_nodes=True)
    draws_latents: ClassVar[bool] = False
    vae_takes_clips: ClassVar[bool] = True
    to_edit: ClassVar = "for edits, pass --model_version edit-2511 or another one of edits; else remove them"

    @property
    def display_name(self) -> str:
        """Return the release's name for messages."""
        return self.version.display_name

    @property
    def release(self) -> ModelRelease:
        """Repository and license of the released model."""
        return self.version.release

    @property
    def references(self) -> ReferenceRules | None:
        """Return how many reference images the model takes, and which networks use them."""
        return self.version.references

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata: architecture, training resolution and, for edits, the task."""
        names = {
            "architecture": self.version.architecture,
            "resolution": "1328x1328" if self.references is None else "1024x1024",
            "implementation": "https://github.com/QwenLM/Qwen-Image",
            "model_type": "qwen_image",
        }
        if self.references is not None:
            names["task"] = self.display_name.lower().removeprefix("qwen-image-")
        return self.add_file_names(names)

    # encoding

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Return what cached latents depend on: the VAE, and the range of its input pixels."""
        return {**super().media_identity, **PIXELS}

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return the cache entry of each image: normalized posterior means of the image and its references.

        They have the VAE's dtype.
        """
        vae = encoders.vae
        return encode_images(media, vae.device, lambda frames: vae.encode(to_pixels(frames)).to(vae.dtype))

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions of a training batch: the captions' states, and the references.

        Raises CacheError if caches are from another release or encode another range of pixel values.
        """
        check_batch(batch, self.version, self.files)
        return {KEY: batch.tensors[KEY], **get_references(batch, LATENT.channels, PATCH, LATENTS_AGAIN)}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C 1 H W float32.

        `cond` contains:
            vl_embed: States of the language model, T D for each sample.
            latents_control_0, ...: Clean latents of references, B C 1 h w each, if there are any.
        """
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_text_and_mask(cond, "text", KEY, noisy.device),
            # the second text (NAG) gets the argument names of the network, too
            overrides=overrides.rename_nag(lambda text: name_text_and_mask(text, "text", KEY, noisy.device)),
            references=references_in(cond, noisy.device),
            clean_references=self.version.clean_references,
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Fill in a request's unset fields; by default, the image size determines the noise levels.

        Raises OptionError for control images if the release does not edit.
        """
        if request.control_images and self.references is None:
            raise OptionError(
                f"--control_image_path: {self.display_name} generates images from text alone. Pass "
                "--model_version edit, edit-2509 or edit-2511 and its transformer, or omit it"
            )
        if LAYER_COUNT in request.extra:
            text = "--%s %s (--f in a prompt line) is ignored because %s generates no layers"
            logger.warning(text, LAYER_COUNT, request.extra[LAYER_COUNT], self.display_name)
        prepared = self.resolve_image(fill_size(request), 1.0, NEGATIVE)
        prepared = add_reference_images(
            replace(prepared, rules=GuidanceRules(norm_patch_size=PATCH)), self.edit
        )
        if request.flow_shift is not None:
            return prepared
        # the release's own noise levels, interpolated between those for few and for many tokens
        solver = SOLVER if prepared.solver == "euler" else prepared.solver
        tokens = family.count_image_tokens(LATENT.shape(1, prepared.height, prepared.width))
        flow_shift = size_shift(tokens, SHIFT_AT_FEW_TOKENS, SHIFT_AT_MANY_TOKENS)
        return replace(prepared, flow_shift=flow_shift, solver=solver)

    def comfy_model(self) -> "ComfyModel":
        """Return the ComfyUI workflow settings; raise OptionError for a release that edits images."""
        if self.references is not None:
            raise OptionError(f"{self.display_name} starts from images")
        from qwen_image.workflow import TEXT_TO_IMAGE  # only with --save_workflow

        return TEXT_TO_IMAGE

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the images to edit as posterior means `latents_control_0`, ..., each 1 C 1 h w."""
        conditions: dict[str, Tensor | list[Tensor]] = {}
        fits = self.edit.resize_control_to_image_size
        target = (prepared.width, prepared.height) if fits else None
        for index, path in enumerate(prepared.request.control_images):
            frames = read_reference(path, target, area=find_area(self.edit))[None, None]
            conditions[f"{CONTROL}_{index}"] = encoders.vae.encode(to_pixels(frames))
        return {0: conditions}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: family.NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section; with a mask or --rcm_threshold, unchanged parts are reset to the source."""
        section = prompts[0].section(self.draw_noise(prepared, noise), inputs.get(0))
        first = inputs.get(0, {}).get(f"{CONTROL}_0")
        if isinstance(first, Tensor):
            section = replace(section, edit_reference=read_edit_reference(prepared, first, self.edit))
        return (yield section)


def family_for_latent_caching(options: QwenImageLatentCachingOptions) -> "QwenImage | QwenImageLayered":
    """Build the model description for qwen_image_cache_latents.py, which needs only the VAE."""
    version = VERSIONS[options.version.name]
    files = QwenImageReleaseFiles(version=version).add_vae(options.vae.file)
    return QwenImageLayered(files) if version.has_layers else QwenImage(files, version)


def family_for_text_caching(options: QwenImageTextCachingOptions) -> "QwenImage | QwenImageLayered":
    """Build the model description for qwen_image_cache_text_encoder_outputs.py: only the text encoder."""
    version = VERSIONS[options.version.name]
    files = QwenImageReleaseFiles(encoder_settings=version.encoder_settings, version=version).add_text(
        options.text
    )
    return QwenImageLayered(files) if version.has_layers else QwenImage(files, version)


def family_for_training(options: QwenImageTrainingOptions) -> "QwenImage | QwenImageLayered":
    """Build the model description for qwen_image_train_network.py and qwen_image_train.py."""
    version = VERSIONS[options.version.name]
    files = make_model_files(options, version, version.encoder_settings)
    if not version.has_layers:
        return QwenImage(files, version, options)
    # each batch then has the clean image before its layers
    probability = float(options.remove_first_image_from_target)
    return QwenImageLayered(
        files,
        options,
        omits_first_image=options.remove_first_image_from_target,
        noise=replace(NOISE, first_frame_probability=probability),
    )


def family_for_generation(options: QwenImageGenerationOptions) -> "QwenImage | QwenImageLayered":
    """Build the model description for qwen_image_generate_image.py, for any release of Qwen-Image."""
    version = VERSIONS[options.version.name]
    references = options.references
    encoder_settings = version.encoder_settings
    if encoder_settings.image_format is not None and not references.resize_control_to_official_size:
        # the text encoder is shown the images in their own sizes, as `request_conditions` encodes them
        encoder_settings = replace(
            encoder_settings, image_format=replace(encoder_settings.image_format, read=read_reference)
        )
    files = make_model_files(options, version, encoder_settings)
    if options.vae_enable_tiling and files.vae_tile is None:
        files = replace(files, vae_tile=VAE_TILE)
    if version.has_layers:
        return QwenImageLayered(
            files,
            edit=references,
            omits_first_image=options.layers.remove_first_image_from_target,
            keeps_norms=options.layers.cfg_norm,
        )
    return QwenImage(files, version, edit=references)


_: tuple[type[family.Family], ...] = (QwenImage, QwenImageLayered)
