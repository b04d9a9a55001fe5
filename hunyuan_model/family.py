"""HunyuanVideo and SkyReels V1, described for the shared loops."""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders.files import OneTransformer
from encoders.tiles import posterior_generator
from hunyuan_model.configs import HUNYUAN_VIDEO, SKYREELS_I2V
from hunyuan_model.files import HunyuanFiles
from hunyuan_model.options import (
    HunyuanGenerationOptions,
    HunyuanLatentCachingOptions,
    HunyuanTextCachingOptions,
    HunyuanTrainingOptions,
)
from hunyuan_model.spec import DIT, GUIDANCE_UNIT, LATENT
from hunyuan_model.text_encoders import CLIP, LLAVA_SETTINGS
from hunyuan_model.vae import (
    encode_latents,
    find_first_frame,
    first_frame_condition,
    sample_moments,
)
from modules.devices import select_compute_dtype
from modules.errors import OptionError
from modules.media.pixels import byte_clips, image_pixels
from modules.option_values import require
from modules.options import NO_OPTIONS
from protocols import data, requests
from protocols.family import FLOW, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.inputs import IMAGE, LATENTS, VIDEO
from protocols.loading import Placement
from protocols.rules import ModelRelease, SourceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

TEXT_KEYS = LLAVA_SETTINGS.keys | CLIP.keys
# argument of the network, in their order -> name in caches
TEXT_INPUTS = {"llama": "llm", "llama_mask": "llm_mask", "clip_l": "clipL"}
EMBEDDED_GUIDANCE = 6.0  # default
FLOW_SHIFT = 7.0  # default


@dataclass(frozen=True)
class HunyuanVideo(OneTransformer):
    """Description of HunyuanVideo for one run, built by the `family_for_...` functions below.

    SkyReels V1 has the same networks; its image-to-video transformer is recognized by its input channels.
    """

    files: HunyuanFiles
    dit_channels: int | None = None  # required input channels of the transformer; None for any
    caches_image: bool = False  # caching: whether the first frame is also cached alone
    trained_guidance: float = 1.0  # guidance input of the model in training
    options: Any = NO_OPTIONS  # set only in training

    name: str = field(default="hunyuan_video", init=False)
    model_metadata: ClassVar = {
        "architecture": "hunyuan-video",
        "implementation": "https://github.com/Tencent/HunyuanVideo",
        "model_type": "hunyuan",
    }
    cache_tag: str = field(default="hv", init=False)
    lora_module: str = field(default="networks.lora", init=False)
    latent: data.LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=FLOW, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)

    @property
    def defaults(self) -> data.SamplingDefaults:
        """The release's 50 steps and guidance, and the size of training samples."""
        has_guidance = self.files.dit is None or self.files.dit_header().config.has_guidance
        return data.SamplingDefaults(
            steps=50,
            fps=24.0,
            guidance_scale=1.0,
            embedded_guidance=EMBEDDED_GUIDANCE if has_guidance else None,
            flow_shift=FLOW_SHIFT,
            solver="euler",
            width=256,
            height=256,
            frames=129,
        )

    @property
    def release(self) -> ModelRelease:
        """HunyuanVideo, or SkyReels V1 for its image-to-video transformer."""
        return SKYREELS_I2V if self.files.dit_header().config.kind == "i2v" else HUNYUAN_VIDEO

    # encoding

    def check_named_files(self) -> None:
        """Check all files that options name, and the transformer's input channels."""
        if self.files.dit is not None:
            self._check_dit()
        self.files.check()

    @property
    def media_identity(self) -> Mapping[str, str]:
        """What caches depend on: the VAE, and whether first frames are cached as well."""
        identity = self.files.vae_identity()
        return {**identity, "image": "first frame"} if self.caches_image else identity

    def check_table(self, table: data.MediaTable) -> None:
        """Raise DatasetError if a table has control media, which HunyuanVideo does not use."""
        table.reject_control("HunyuanVideo")

    def encode_media(
        self, encoders: data.MediaEncoders, media: data.MediaBatch
    ) -> list[list[data.CacheEntry]]:
        """Encode latents in the VAE's dtype, not scaled; with `caches_image` also the first frames."""
        parts = media.split_for(encoders.vae.device)
        return [[entry] for part in parts for entry in encode_latents(encoders.vae, part, self.caches_image)]

    @property
    def moments(self) -> data.MomentsRules:
        """Rules for cached moments; image-to-video also needs the moments of first frames."""
        return data.MomentsRules(with_image=self.caches_image)

    def latents_from_moments(self, media: data.MomentsBatch) -> list[data.CacheEntry]:
        """Return cache entries with posterior samples drawn from moments; they equal those from the clips."""
        return sample_moments(media, self.files.encoder_dtype(self.files.vae_dtype))

    # the network

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """The transformer file, with its input channels checked."""
        self._check_dit()
        return (self.files.dit_path,)

    def _check_dit(self) -> None:
        channels = self.files.dit_header().config.in_dim
        if self.dit_channels not in (None, channels):
            raise OptionError(
                f"--dit_in_channels {self.dit_channels}: {self.files.dit_path} takes {channels}. Omit the "
                "option, or pass "
                f"{'the SkyReels V1 image-to-video' if channels == LATENT.channels else 'a text-to-video'} "
                "checkpoint to --dit."
            )

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer, with the factors of --te_multiplier on its text tokens."""
        return self.files.scale_text_tokens(super().load_dit(placement, expert))

    def batch_conditions(self, latents: Tensor, batch: data.Batch) -> data.Conditions:
        """Return the conditions of a training batch: text, guidance (B), `condition_latents` (B C F H W).

        Only transformers that take an image have `condition_latents`.
        """
        batch.check(dict.fromkeys(sorted(TEXT_KEYS), "cache_text_encoder_outputs.py"), "the transformer")
        config = self.files.dit_header().config
        remedy = "cache_text_encoder_outputs.py and the text encoders of HunyuanVideo"
        batch.check_widths({"llm": config.text_dim, "clipL": config.pooled_dim}, self.files.dit_path, remedy)
        conditions: dict[str, Tensor | list[Tensor]] = {
            **{name: batch.tensor(name) for name in TEXT_KEYS},
            # the model takes the strength of guidance as an input, which is constant in training
            "guidance": torch.full((len(latents),), self.trained_guidance, device=latents.device),
        }
        if self._starts_from_image:
            conditions["condition_latents"] = first_frame_condition(
                find_first_frame(batch, latents, LATENT), latents.shape[2]
            )
        return conditions

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: data.Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C F H W float32.

        Timesteps are rounded to the dtype of the guidance: generation rounds both to the model's compute
        dtype, as the released code does; training rounds neither.

        Args:
            dit: The transformer.
            noisy: Noisy latents, B C F H W.
            timesteps: B, 0..1000.
            cond: llm B T D, llm_mask B T, clipL B E, guidance B and, for i2v, condition_latents B C F H W.
            overrides: Changes to this call.
        """
        device = noisy.device
        if "condition_latents" in cond:
            condition = data.send_tensor(cond, "condition_latents", device)
            noisy = torch.cat([noisy, condition.to(noisy)], dim=1)
        guidance = data.send_tensor(cond, "guidance", device)
        return dit(
            noisy,
            timesteps.to(guidance.dtype).float(),
            **data.name_texts(cond, TEXT_INPUTS, device),
            guidance=guidance.float(),
            # the second text (NAG) has the names of caches, too
            overrides=overrides.rename_nag(lambda text: data.name_texts(text, TEXT_INPUTS, device)),
        )

    # generation

    def check_files(self, media: bool) -> None:
        """Check the transformer, its input channels, and text encoders, and with `media` the VAE."""
        self._check_dit()
        super().check_files(media)

    def prepare(self, request: requests.Request) -> requests.Prepared:
        """Resolve a request's size, frames and guidance; warn about media and guidance that are ignored."""
        self._check_dit()
        self.files.check()
        # 1. omit media that the transformer does not take; an image-to-video one needs an image
        usable = {
            "image_path": self._starts_from_image,
            "end_image_path": False,
            "control_path": False,
            "control_images": False,
        }
        request = requests.keep_usable_media(request, usable, f"{self.files.dit_path} does not take it")
        if self._starts_from_image:
            require(request.first_image, "--image_path", f"{self.files.dit_path} starts from an image")
        # 2. fill in the defaults of the model
        default = self.defaults
        if default.embedded_guidance is None and request.embedded_guidance not in (None, EMBEDDED_GUIDANCE):
            scale = request.embedded_guidance
            logger.warning(
                "the embedded guidance %g (--embedded_cfg_scale) is ignored because %s has no input for it",
                scale,
                self.files.dit_path,
            )
        width, height, frames = requests.get_size(request, default)
        # the VAE decodes 4n + 1 frames
        size = width, height, requests.full_frames(frames, LATENT)
        requests.check_size((width, height, frames), LATENT)
        flow_shift = FLOW_SHIFT if request.flow_shift is None else request.flow_shift
        return requests.resolve_request(request, default, size, flow_shift, default_negative="")

    def needs_media(self, prepared: requests.Prepared) -> bool:
        """Return whether the transformer starts from an image."""
        return self._starts_from_image

    @property
    def source(self) -> SourceRules:
        """Rules for starting from a video, an image, or latents of this model or FramePack."""
        return SourceRules(
            (VIDEO, IMAGE, LATENTS), "HunyuanVideo", False, frozenset({"hunyuan", "framepack"})
        )

    def encode_source(self, encoders: data.MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames as a posterior sample with this seed, in model space."""
        return encoders.vae.encode(byte_clips(frames), [posterior_generator(seed)]) * LATENT.scale

    def request_conditions(
        self, encoders: data.MediaEncoders, prepared: requests.Prepared
    ) -> Mapping[int, data.Conditions]:
        """Encode the image as `condition_latents`, on the CPU, in model space."""
        image = prepared.request.first_image
        width, height, frames = prepared.width, prepared.height, prepared.frames
        generators = [posterior_generator(prepared.seed)]
        conditions: dict[str, Tensor | list[Tensor]] = {}
        if self._starts_from_image and image is not None:
            image_latents = encoders.vae.encode(image_pixels(image, width, height), generators) * LATENT.scale
            latent_frames = LATENT.shape(frames, height, width)[2]
            conditions["condition_latents"] = first_frame_condition(image_latents, latent_frames).cpu()
        return {0: conditions}

    def sections(
        self,
        prepared: requests.Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, data.Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the video's one section for the denoising loop, and return its latents.

        Noise is drawn frame by frame, so that a longer video starts with the noise of a shorter one.
        """
        batch, channels, latent_frames, rows, columns = LATENT.shape(
            prepared.frames, prepared.height, prepared.width
        )
        frame_noise = [
            noise.draw((batch, channels, 1, rows, columns), torch.bfloat16) for _ in range(latent_frames)
        ]
        # keys of `prompts` and `inputs` are section numbers; a video has section 0
        conditions = dict(inputs.get(0, {}))
        guidance = GUIDANCE_UNIT * (prepared.embedded_guidance or 0.0)
        conditions["guidance"] = torch.full((1,), guidance, dtype=self.files.compute_dtype())
        # the denoising loop sends the finished latents back as the value of `yield`
        return (yield prompts[0].section(torch.cat(frame_noise, dim=2).float(), conditions))

    def decode(self, encoders: data.MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels, one frame and then four at a time."""
        yield from encoders.vae.decode(latents / LATENT.scale)

    @property
    def caching_switches(self) -> tuple[str, ...]:
        """Return --i2v if the transformer starts from an image."""
        return ("--i2v",) if self.files.dit is not None and self._starts_from_image else ()

    @property
    def _starts_from_image(self) -> bool:
        return self.files.dit_header().config.kind == "i2v"


def family_for_latent_caching(options: HunyuanLatentCachingOptions) -> HunyuanVideo:
    """Build the model description for cache_latents.py, which needs only the VAE."""
    return HunyuanVideo(HunyuanFiles().add_chunks(options.vae), caches_image=options.i2v)


def family_for_text_caching(options: HunyuanTextCachingOptions) -> HunyuanVideo:
    """Build the model description for cache_text_encoder_outputs.py, which needs only the text encoders."""
    return HunyuanVideo(HunyuanFiles().add_text(options.text))


def family_for_training(options: HunyuanTrainingOptions) -> HunyuanVideo:
    """Build the model description for hv_train_network.py and the other training runs of HunyuanVideo."""
    dtype = select_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    return HunyuanVideo(
        HunyuanFiles(options.dit, dtype).add_encoders(options.vae, options.text),
        # 16 is the option's default and checks nothing
        dit_channels=options.dit_in_channels if options.dit_in_channels != LATENT.channels else None,
        trained_guidance=options.embedded_guidance,
        options=options,
    )


def family_for_generation(options: HunyuanGenerationOptions) -> HunyuanVideo:
    """Build the model description for hv_generate_video.py."""
    return HunyuanVideo(
        HunyuanFiles(options.dit, reading=options.reading).add_encoders(options.vae, options.text),
        dit_channels=options.dit_in_channels,
    )


_: type[Family] = HunyuanVideo
