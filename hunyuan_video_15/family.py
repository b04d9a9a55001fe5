"""HunyuanVideo 1.5 for clips from text or an image, described for the shared loops."""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.opening import fingerprint
from encoders.files import OneTransformer
from hunyuan_video_15.configs import (
    LARGE,
    NAME,
    SMALL,
    SMALL_T2V_SHIFT,
    T2V,
    HunyuanVideo15Task,
    is_large,
    is_small,
    nearest_size,
)
from hunyuan_video_15.files import HunyuanVideo15Files, select_task
from hunyuan_video_15.names import LORA
from hunyuan_video_15.options import (
    HunyuanVideo15GenerationOptions,
    HunyuanVideo15LatentCachingOptions,
    HunyuanVideo15TextCachingOptions,
    HunyuanVideo15TrainingOptions,
    release_name,
)
from hunyuan_video_15.spec import DIT, LATENT, RELEASE
from hunyuan_video_15.text_encoders import GLYPHS_KEY, QWEN_SETTINGS, STATES_KEY, TEXT_KEYS
from modules.errors import CacheError
from modules.media.pixels import byte_clips, image_pixels, image_size, to_pixels
from modules.option_values import require
from modules.options import NO_OPTIONS
from protocols.data import (
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
    name_text_and_mask,
    send_tensor,
    split_items,
)
from protocols.family import FLOW, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.inputs import IMAGE, LATENTS, VIDEO
from protocols.requests import (
    NO_MEDIA,
    Prepared,
    Request,
    check_size,
    full_frames,
    get_size,
    keep_usable_media,
    resolve_request,
)
from protocols.rules import ModelRelease, SourceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

LATENTS_AGAIN = "hv_1_5_cache_latents.py --i2v --image_encoder SIGLIP_FILE"
TEXTS_AGAIN = "hv_1_5_cache_text_encoder_outputs.py"
# conditions of clips from an image, also in caches: latents of the first frame, encoded alone, B C 1 h w, not
# scaled to model space in caches; and SigLIP's states of it, B S D
FIRST_LATENTS, IMAGE_STATES = "latents_image", "siglip"
WIDE = (16, 9)  # aspect ratio of clips from text, if no size is given


@dataclass(frozen=True)
class HunyuanVideo15(OneTransformer):
    """Description of HunyuanVideo 1.5 for one run, built by the `family_for_...` functions below."""

    files: HunyuanVideo15Files
    takes_image: bool = False  # whether a request may have a first frame
    caches_image: bool = False  # caching: whether first frames are cached too
    options: Any = NO_OPTIONS  # set only in training

    name: str = field(default="hunyuan_video_1_5", init=False)
    cache_tag: str = field(default="hv15", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=FLOW, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)

    @property
    def task(self) -> HunyuanVideo15Task:
        """The use of the model."""
        return self.files.task

    @property
    def area_side(self) -> int:
        """Side in pixels of a square with the area of a clip, which the name of the transformer says."""
        return LARGE if is_large(release_name(self.files.dit)) else SMALL

    @property
    def defaults(self) -> SamplingDefaults:
        """Steps, guidance and length of the task; size and flow shift of the release."""
        task = self.task
        width, height = nearest_size(*WIDE, self.area_side)
        is_small_t2v = task.name == T2V and is_small(release_name(self.files.dit))
        return SamplingDefaults(
            steps=task.steps,
            fps=24.0,
            guidance_scale=task.guidance,
            embedded_guidance=None,
            flow_shift=SMALL_T2V_SHIFT if is_small_t2v else task.flow_shift,
            solver="euler",
            width=width,
            height=height,
            frames=task.frames,
            sized_by_images=task.requires_image,
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the model: its task and the names of its files."""
        names = {
            "architecture": "hunyuan-video-1.5",
            "implementation": "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5",
            "model_type": "hunyuan_video_1_5",
            "task": self.task.name,
        }
        return self.add_file_names(names)

    # encoding

    @property
    def media_identity(self) -> Mapping[str, str]:
        """What caches depend on: the VAE and, if first frames are cached as well, the image encoder."""
        identity = self.files.vae_identity()
        if not self.caches_image:
            return identity
        siglip = fingerprint(self.files.image_encoder_path)
        return {**identity, "image": "first frame", "image_encoder": siglip}

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Load the VAE and, for clips from an image, SigLIP."""
        files = self.files
        needs_siglip = images and (self.caches_image or files.image_encoder is not None)
        return MediaEncoders(
            files.load_vae(device), files.load_image_encoder(device) if needs_siglip else None
        )

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has control media, which the model does not use."""
        table.reject_control(NAME)

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode clips as means of the posterior, not scaled; with `caches_image` also their first frames."""
        entries: list[list[CacheEntry]] = []
        vae = encoders.vae
        for part in media.split_for(vae.device):
            pixels = byte_clips(part.frames)
            tensors = {"latents": vae.encode(pixels).to(vae.dtype)}
            if self.caches_image:
                tensors[FIRST_LATENTS] = vae.encode(pixels[:, :, :1]).to(vae.dtype)
                first = to_pixels(part.frames[:, :1]).squeeze(2)
                tensors[IMAGE_STATES] = encoders.image_encoder.encode(first).to(vae.dtype)
            entries += [[entry] for entry in split_items(tensors)]
        return entries

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions of a training batch: texts and, for --task i2v, the first frame.

        Raises CacheError if they are missing, have another width, or were encoded with another template.
        """
        needed = dict.fromkeys(sorted(TEXT_KEYS), TEXTS_AGAIN)
        config = self.files.dit_header().config
        widths = {STATES_KEY: config.text_dim, GLYPHS_KEY: config.glyph_dim}
        if self.task.requires_image:
            needed |= dict.fromkeys((FIRST_LATENTS, IMAGE_STATES), LATENTS_AGAIN)
        batch.check(needed, f"--task {self.task.name}")
        batch.check_widths(widths, self.files.dit_path, f"{TEXTS_AGAIN} and the text encoders of {NAME}")
        path = QWEN_SETTINGS.find_other_template(batch)
        if path is not None:
            raise CacheError(
                f"{path}: its caption was encoded with another template. Cache again with {TEXTS_AGAIN}."
            )
        conditions = {name: batch.tensors[name] for name in TEXT_KEYS}
        if self.task.requires_image:
            batch.check_widths({IMAGE_STATES: config.image_dim}, self.files.dit_path, LATENTS_AGAIN)
            conditions[FIRST_LATENTS] = LATENT.to_model(batch.tensor(FIRST_LATENTS))
            conditions[IMAGE_STATES] = batch.tensor(IMAGE_STATES)
        return conditions

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C F H W float32.

        `cond` contains:
            vl_embed: States of the language model, T D for each sample.
            byt5_embed: States of ByT5, G E for each sample; G is 0 for a prompt without quotation marks.
            latents_image, siglip: Only of clips from an image: the first frame's latents in model space,
                B C 1 H W, and its states, B S I.
        """
        device = noisy.device
        image: dict[str, Tensor] = {}
        if FIRST_LATENTS in cond:
            image = {
                "first_latents": send_tensor(cond, FIRST_LATENTS, device).to(noisy.dtype),
                "image": send_tensor(cond, IMAGE_STATES, device),
            }
        name_inputs = partial(_name_texts, device=device)
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_inputs(cond),
            **image,
            overrides=overrides.rename_nag(name_inputs),
        )
        return velocity

    # generation

    def check_files(self, media: bool) -> None:
        """Check the transformer and text encoders, and with `media` the VAE and for i2v the image encoder."""
        super().check_files(media)
        if media and self.task.requires_image:
            self.files.check(("image_encoder",))

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request's size, frames and guidance; a clip gets the aspect ratio of its first image."""
        task = self.task
        usable = {**NO_MEDIA, "image_path": self.takes_image}
        request = keep_usable_media(request, usable, f"--task {task.name} does not take it")
        image = request.first_image
        if task.requires_image:
            image = require(image, "--image_path", f"--task {task.name} starts from an image")
        self.files.check(() if image is None else ("image_encoder",))
        default = self.defaults
        width, height, frames = get_size(request, default)
        if image is not None and request.width is None and request.height is None:
            width, height = nearest_size(*image_size(image), self.area_side)
        size = width, height, full_frames(frames, LATENT)
        check_size(size, LATENT)
        assert default.flow_shift is not None
        flow_shift = default.flow_shift if request.flow_shift is None else request.flow_shift
        return resolve_request(request, default, size, flow_shift, default_negative="")

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether the clip begins with an image."""
        return prepared.request.first_image is not None

    @property
    def source(self) -> SourceRules:
        """Rules for starting from a video, an image, or latents of this model."""
        return SourceRules((VIDEO, IMAGE, LATENTS), NAME, False, frozenset({self.name}))

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames as the mean of the posterior, in model space; `seed` is unused."""
        latents: Tensor = encoders.vae.encode(byte_clips(frames))
        return LATENT.to_model(latents)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the image of a request: its latents in model space and SigLIP's states, on the CPU."""
        image = prepared.request.first_image
        if image is None:
            return {0: {}}
        pixels = image_pixels(image, prepared.width, prepared.height, shrink="lanczos")
        return {
            0: {
                FIRST_LATENTS: LATENT.to_model(encoders.vae.encode(pixels)).cpu(),
                IMAGE_STATES: encoders.image_encoder.encode(pixels.squeeze(2)).cpu(),
            }
        }

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section to the denoising loop, and return its latents."""
        shape = LATENT.shape(prepared.frames, prepared.height, prepared.width)
        drawn = noise.draw(shape, self.files.compute_dtype() or torch.float32).float()
        return (yield prompts[0].section(drawn, dict(inputs.get(0, {}))))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels, one frame and then four at a time."""
        yield from encoders.vae.decode(latents / LATENT.scale)


def _name_texts(texts: Conditions, device: torch.device) -> dict[str, Tensor]:
    """Return the states of both encoders and their masks, by the names of the network's arguments."""
    return {
        **name_text_and_mask(texts, "text", STATES_KEY, device),
        **name_text_and_mask(texts, "glyphs", GLYPHS_KEY, device),
    }


def family_for_latent_caching(options: HunyuanVideo15LatentCachingOptions) -> HunyuanVideo15:
    """Build the model description for hv_1_5_cache_latents.py: the VAE and, with --i2v, SigLIP."""
    files = HunyuanVideo15Files(image_encoder=options.image_encoder if options.i2v else None)
    return HunyuanVideo15(files.add_vae_options(options.vae), caches_image=options.i2v)


def family_for_text_caching(options: HunyuanVideo15TextCachingOptions) -> HunyuanVideo15:
    """Build the model description for hv_1_5_cache_text_encoder_outputs.py: only text encoders."""
    return HunyuanVideo15(HunyuanVideo15Files().add_text(options.text))


def family_for_training(options: HunyuanVideo15TrainingOptions) -> HunyuanVideo15:
    """Build the model description for hv_1_5_train_network.py and hv_1_5_train.py."""
    files = _make_files(options)
    # filled in here, because the value is recorded and compared later
    options = replace(options, task=files.task.name)
    return HunyuanVideo15(files, takes_image=files.task.requires_image, options=options)


def family_for_generation(options: HunyuanVideo15GenerationOptions) -> HunyuanVideo15:
    """Build the model description for hv_1_5_generate_video.py."""
    return HunyuanVideo15(_make_files(options), takes_image=options.task != T2V)


def _make_files(
    options: HunyuanVideo15TrainingOptions | HunyuanVideo15GenerationOptions,
) -> HunyuanVideo15Files:
    files = HunyuanVideo15Files(
        task=select_task(options.task, options.dit), image_encoder=options.image_encoder
    )
    return files.add_dit(options.dit, options.dit_dtype).add_vae_options(options.vae).add_text(options.text)


_: type[Family] = HunyuanVideo15
