"""FramePack and FramePack-F1, described for the shared loops."""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.opening import fingerprint
from encoders.files import OneTransformer
from encoders.siglip import load_siglip
from frame_pack import caching
from frame_pack.batches import HISTORY, TEXT_KEYS, read_conditions, warn_about_section_order
from frame_pack.configs import DIT, FRAMEPACK, FRAMEPACK_F1
from frame_pack.files import FramePackFiles
from frame_pack.generating import decode_video, one_frame_section, video_sections
from frame_pack.inputs import encode_clip, one_frame_inputs, video_inputs
from frame_pack.model import position_scale
from frame_pack.names import LORA
from frame_pack.options import (
    DEFAULT_SECONDS,
    FRAMES_PER_SECOND,
    WINDOW,
    FramePackGenerationOptions,
    FramePackLatentCachingOptions,
    FramePackTextCachingOptions,
    FramePackTrainingOptions,
)
from frame_pack.requests import FramePackRequest, prepare_request, warn_about_unused_paddings
from frame_pack.sections import (
    ANTI_DRIFTING,
    F1,
    GenerationOrder,
    count_sections,
    parse_paddings,
    video_frames,
)
from hunyuan_model.spec import GUIDANCE_UNIT, PREVIEW_BIAS, PREVIEW_FACTORS
from modules.errors import DatasetError
from modules.options import NO_OPTIONS
from modules.speed_options import VAE_TILE
from protocols import data
from protocols.family import FLOW, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.inputs import LATENTS, VIDEO
from protocols.loading import Placement
from protocols.one_frame import OneFrame
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease, SourceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

# caches hold latents in model space already: the scale of HunyuanVideo's VAE is applied where they are
# encoded and decoded
LATENT = data.LatentSpec(
    channels=16,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
    in_sections=True,
    masks_latents=True,
)
TEXT_INPUTS = {  # argument of the network, in their order -> name in caches
    "llama": "llama_vec",
    "llama_mask": "llama_attention_mask",
    "clip_l": "clip_l_pooler",
}
EMBEDDED_GUIDANCE = 10.0  # default
UNCUT = 16 * 2**20  # frames per tile: more than any clip has, so that clips are not tiled in time


@dataclass(frozen=True)
class FramePack(OneTransformer):
    """Description of FramePack for one run, built by the `family_for_...` functions below.

    FramePack-F1 has the same networks, but generates sections in another order; its files do not show this.
    """

    files: FramePackFiles
    window: int = WINDOW  # latent frames of a section
    is_f1: bool = False
    bulk_decode: bool = False
    paddings: tuple[int, ...] = ()  # --latent_paddings
    # images generated from control images, in place of clips: in caches, and in training samples
    one_frame: OneFrame | None = None
    # --one_frame_auto_resize: a single image gets its control image's aspect ratio
    matches_control_shape: bool = False
    rope_threshold: float | None = None  # timestep from which on `rope_factor` is used
    rope_factor: float = 1.0  # factor on positions along rows and columns
    trained_guidance: float = 1.0  # embedded guidance in training
    options: Any = NO_OPTIONS  # set only in training

    name: str = field(default="framepack", init=False)
    cache_tag: str = field(default="fp", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: data.LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=FLOW, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)

    @property
    def order(self) -> GenerationOrder:
        """Return the order in which sections are generated."""
        return F1 if self.is_f1 else ANTI_DRIFTING

    @property
    def defaults(self) -> data.SamplingDefaults:
        """Return the defaults of a generation; the flow shift is None because it depends on the size."""
        return data.SamplingDefaults(
            steps=25,
            fps=float(FRAMES_PER_SECOND),
            guidance_scale=1.0,
            embedded_guidance=EMBEDDED_GUIDANCE,
            flow_shift=None,
            solver="unipc-bh1",
            width=256,
            height=256,
            frames=video_frames(count_sections(DEFAULT_SECONDS, self.window), self.window),
            noise_on_cpu=True,
            extras=("one_frame",),
        )

    @property
    def release(self) -> ModelRelease:
        """FramePack or, with --f1, FramePack-F1."""
        return FRAMEPACK_F1 if self.is_f1 else FRAMEPACK

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata, with what it was trained for: single images or videos."""
        version = "-F1" if self.is_f1 else ""
        is_one_frame = self.one_frame is not None
        names = {
            "architecture": "framepack",
            "implementation": "https://github.com/lllyasviel/FramePack",
            "model_type": "framepack",
            "trained_for": "single images" if is_one_frame else f"videos of FramePack{version}",
        }
        return self.add_file_names(names)

    # encoding

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Return what caches depend on: VAE and its tiling in time, image encoder, and kind of sections."""
        kind = "f1" if self.is_f1 else "anti-drifting"
        if self.one_frame is not None:
            left_out = {"no 2x": not self.one_frame.has_2x, "no 4x": not self.one_frame.has_4x}
            kind = ", ".join(["one frame", *(name for name, is_so in left_out.items() if is_so)])
        return {
            **self.files.vae_identity(),
            "image_encoder": fingerprint(self.files.image_encoder_path),
            "tile_frames": str(self.files.vae_tile_frames),
            "sections": kind,
        }

    def media_encoders(self, device: torch.device, images: bool = True) -> data.MediaEncoders:
        """Load the VAE, and with `images` also SigLIP."""
        files = self.files
        siglip = load_siglip(files.image_encoder_path, device, files.encoder_dtype(None)) if images else None
        return data.MediaEncoders(files.load_vae(device), siglip)

    def check_table(self, table: data.MediaTable) -> None:
        """Raise DatasetError without long enough clips or, with --one_frame, images with control images."""
        caching.check_table(table, self.one_frame is not None)

    def sections_of(self, table: data.MediaTable, frames: int) -> int | None:
        """Return how many sections a clip has; raise MediaError if it is too short for one."""
        return None if self.one_frame is not None else caching.count_sections(table, frames)

    def encode_media(
        self, encoders: data.MediaEncoders, media: data.MediaBatch
    ) -> list[list[data.CacheEntry]]:
        """Return the cache entries: one per section of each clip, or one per image.

        They are stored in the VAE's dtype, in model space.
        """
        parts = media.split_for(encoders.vae.device)
        if self.one_frame is not None:
            return [item for part in parts for item in caching.image_entries(encoders, part, self.one_frame)]
        return [item for part in parts for item in caching.clip_entries(encoders, part, self.order)]

    @property
    def moments(self) -> data.MomentsRules:
        """Rules that refuse moments (`load_tensors`): sections also need SigLIP's features of frames."""
        return data.MomentsRules(caching.NO_MOMENTS)

    def latents_from_moments(self, media: data.MomentsBatch) -> list[data.CacheEntry]:
        """Raise DatasetError: caches cannot be made from moments."""
        raise DatasetError(f"{media.keys[0]}: {caching.NO_MOMENTS}")

    # the network

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer, and scale its text tokens by --te_multiplier."""
        return self.files.scale_text_tokens(super().load_dit(placement, expert))

    def batch_conditions(self, latents: Tensor, batch: data.Batch) -> data.Conditions:
        """Return a batch's conditions: all cached tensors except the target, and guidance (B)."""
        guidance = torch.full((len(latents),), GUIDANCE_UNIT * self.trained_guidance, device=latents.device)
        conditions = read_conditions(batch, self.files.dit_header().config, self.files.dit_path)
        warn_about_section_order(batch, self.is_f1, self.one_frame is not None)
        return {**conditions, "guidance": guidance}

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
            cond: Conditions by their names in caches, and guidance B.
            overrides: Changes to this call.
        """
        device = noisy.device
        guidance = data.send_tensor(cond, "guidance", device)
        # the timestep sets how far rotary positions are scaled; `step_position.timestep` is on the host, so
        # reading it does not wait for the device
        scaling_timestep = timesteps
        if overrides.step_position is not None:
            scaling_timestep = torch.tensor([overrides.step_position.timestep])
        scaling_timestep = scaling_timestep.to(guidance.dtype).float()
        return dit(
            noisy,
            timesteps.to(guidance.dtype).float(),
            **data.name_texts(cond, TEXT_INPUTS, device),
            guidance=guidance.float(),
            image_embeddings=data.send_tensor(cond, "image_embeddings", device),
            latent_indices=data.send_tensor(cond, "latent_indices", device),
            **_history_arguments(cond, noisy),
            position_scale=position_scale(scaling_timestep, self.rope_threshold, self.rope_factor),
            overrides=overrides.rename_nag(lambda text: data.name_texts(text, TEXT_INPUTS, device)),
        )

    # generation

    def check_files(self, media: bool) -> None:
        """Check transformer and text encoders, and with `media` also the VAE and the image encoder."""
        self.files.check(("dit", "texts", *(("vae", "image_encoder") if media else ())))

    def prepare(self, request: Request) -> Prepared:
        """Fill in a request as sections of a video or, in one-frame inference, as a single image."""
        if self.one_frame is not None:  # samples of a training run of images
            request = replace(request, extra={"one_frame": "default", **request.extra})
        self.files.check(("dit", "image_encoder"))
        prepared = prepare_request(
            request,
            self.defaults,
            LATENT,
            window=self.window,
            is_f1=self.is_f1,
            matches_control_shape=self.matches_control_shape,
        )
        if not self.is_f1:  # F1 ignores paddings; the warning was logged once for the run
            warn_about_unused_paddings(self.paddings, prepared.family_settings)
        return prepared

    def needs_media(self, prepared: Prepared) -> bool:
        """Return True: every video starts from an image."""
        return True

    @property
    def source(self) -> SourceRules:
        """Return what denoising may start from: a video, or latents of this model or HunyuanVideo."""
        return SourceRules((VIDEO, LATENTS), "FramePack", False, frozenset({"framepack", "hunyuan"}))

    def encode_source(self, encoders: data.MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames section by section as posterior samples drawn with `seed`."""
        return encode_clip(encoders.vae, frames, seed, self.window)

    def request_conditions(
        self, encoders: data.MediaEncoders, prepared: Prepared
    ) -> Mapping[int, data.Conditions]:
        """Encode each section's start images, or a single image's control images."""
        settings: FramePackRequest = prepared.family_settings
        if settings.one_frame is None:
            return video_inputs(encoders, prepared)
        return one_frame_inputs(encoders, prepared)

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, data.Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield each section for the denoising loop, in the order of generation; an image has one."""
        scale = GUIDANCE_UNIT * (prepared.embedded_guidance or 0.0)
        guidance = torch.full((1,), scale, dtype=self.files.compute_dtype())
        settings: FramePackRequest = prepared.family_settings
        if settings.one_frame is not None:
            return one_frame_section(
                settings.one_frame,
                prompts[0],
                inputs[0],
                noise=noise,
                guidance=guidance,
                window=self.window,
                shape=LATENT.shape(1, prepared.height, prepared.width),
            )
        return video_sections(
            prompts,
            inputs,
            noise,
            guidance=guidance,
            order=self.order,
            window=self.window,
            paddings=self.paddings,
        )

    def decode(self, encoders: data.MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents to pixels, section by section unless --bulk_decode is set."""
        return decode_video(encoders.vae, latents, self.window, self.bulk_decode)

    @property
    def caching_switches(self) -> tuple[str, ...]:
        """Return --f1 and --one_frame if this run uses them."""
        return tuple(
            switch
            for switch, is_on in {"--f1": self.is_f1, "--one_frame": self.one_frame is not None}.items()
            if is_on
        )


def _history_arguments(cond: data.Conditions, noisy: Tensor) -> dict[str, Tensor]:
    """Return the latents of earlier frames and their indices, keyed by the network's argument names."""
    # Frames that have indices but no latents in the conditions are black.
    arguments: dict[str, Tensor] = {}
    for name, history in HISTORY.items():
        if history.indices not in cond:
            continue
        indices = data.send_tensor(cond, history.indices, noisy.device)
        if name in cond:
            latents = data.send_tensor(cond, name, noisy.device).to(noisy.dtype)
        else:
            latents = noisy.new_zeros(*noisy.shape[:2], indices.shape[1], *noisy.shape[3:])
        arguments[history.argument] = latents
        arguments[history.indices] = indices
    return arguments


def family_for_latent_caching(options: FramePackLatentCachingOptions) -> FramePack:
    """Build the model description for fpack_cache_latents.py, which needs the VAE and the image encoder."""
    files = _tile_vae(FramePackFiles(image_encoder=options.image_encoder).add_chunks(options.vae))
    one_frame = OneFrame(has_2x=not options.one_frame_no_2x, has_4x=not options.one_frame_no_4x)
    return FramePack(
        replace(files, vae_tile_frames=caching.FULL_FRAMES),
        is_f1=options.f1,
        one_frame=one_frame if options.one_frame else None,
    )


def family_for_text_caching(options: FramePackTextCachingOptions) -> FramePack:
    """Build the model description for fpack_cache_text_encoder_outputs.py: only the text encoders."""
    return FramePack(FramePackFiles().add_text(options.text))


def family_for_training(options: FramePackTrainingOptions) -> FramePack:
    """Build the model description for fpack_train_network.py; section options affect only its samples."""
    options = replace(options, f1=options.f1 and not options.one_frame)  # ignored with a warning
    return FramePack(
        _make_files(options),
        window=options.latent_window_size,
        is_f1=options.f1,
        bulk_decode=options.bulk_decode,
        one_frame=OneFrame() if options.one_frame else None,
        trained_guidance=options.embedded_guidance,
        options=options,
    )


def family_for_generation(options: FramePackGenerationOptions) -> FramePack:
    """Build the model description for fpack_generate_video.py; warn about --latent_paddings with --f1."""
    if options.f1 and options.latent_paddings is not None:
        logger.warning(
            "--latent_paddings %s is ignored because --f1 generates a video from its start",
            options.latent_paddings,
        )
    return FramePack(
        replace(_make_files(options), reading=options.reading),
        window=options.latent_window_size,
        is_f1=options.f1,
        bulk_decode=options.bulk_decode,
        paddings=() if options.latent_paddings is None else parse_paddings(options.latent_paddings),
        matches_control_shape=options.one_frame_auto_resize,
        rope_threshold=options.rope_scaling_timestep_threshold,
        rope_factor=options.rope_scaling_factor,
    )


def _tile_vae(files: FramePackFiles) -> FramePackFiles:
    """Turn on VAE tiling, because FramePack's clips are long."""
    return replace(files, vae_tile=files.vae_tile or VAE_TILE)


def _make_files(options: FramePackTrainingOptions | FramePackGenerationOptions) -> FramePackFiles:
    """Return all files; clips decoded as a whole are not tiled in time, because sections are blended."""
    files = FramePackFiles(options.dit, image_encoder=options.image_encoder, vae_tile_frames=UNCUT)
    return _tile_vae(files.add_encoders(options.vae, options.text))


_: type[Family] = FramePack
