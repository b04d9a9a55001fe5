"""FramePack and FramePack-F1 as the shared loops see them."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frame_pack import caching
from frame_pack.batches import HISTORY, TEXT_KEYS, compare_order, conditions_of
from frame_pack.checkpoints import load_dit
from frame_pack.files import FramePackFiles
from frame_pack.generating import decoded, one_frame_section, video_sections
from frame_pack.image_encoder import load_siglip
from frame_pack.inputs import one_frame_inputs, video_inputs
from frame_pack.one_frame import OneFrame
from frame_pack.options import (
    WINDOW,
    FramePackGenerationOptions,
    FramePackLatentCachingOptions,
    FramePackTextCachingOptions,
    FramePackTrainingOptions,
)
from frame_pack.positions import position_scale
from frame_pack.requests import sections_of, settled, tell_unused_paddings, texts_of
from frame_pack.sections import ANTI_DRIFTING, F1, FRAMES_PER_SECOND, Order, parse_paddings, video_frames
from frame_pack.spec import DIT
from frame_pack.text_encoders import framepack_clip, framepack_llama
from hunyuan_model.encoders import Encoders, beside
from hunyuan_model.family import GUIDANCE_UNIT
from hunyuan_model.text_multipliers import FRAMEPACK_REFINER, multiply_text
from modules.checkpoints.dits import kept_dtype
from modules.checkpoints.opening import fingerprint
from modules.contract.data import Batch, CacheEntry, Conditions, MediaBatch, MediaEncoders, MediaTable
from modules.contract.family import DitSpec, Family, LatentSpec, NoiseSource, SamplingDefaults, TextEncoder
from modules.contract.generation import NO_TWEAKS, EncodedPrompts, Prompt, Prompts, Request, Section, Tweaks
from modules.contract.loading import Placement
from modules.contract.noise import FLOW, NoiseSpec
from modules.contract.requests import with_negative
from modules.devices import sent
from modules.options import NO_OPTIONS
from modules.vae_options import VAE_TILE

logger = logging.getLogger(__name__)

# caches hold latents in model space already: the scale of HunyuanVideo's VAE is applied where they are
# encoded and decoded
LATENT = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4, in_sections=True)
EMBEDDED_GUIDANCE = 10.0  # where nothing is said
USUAL_SECTIONS = 4  # 5 seconds
UNCUT = 16 * 2**20  # frames of a tile: more than any clip has


@dataclass(frozen=True)
class FramePack:
    """The description of FramePack for one run. Made by the `family_for_...` functions below.

    FramePack-F1 has the same networks and another order of sections; nothing in its file tells one from the
    other.
    """

    files: FramePackFiles
    window: int = WINDOW  # latent frames of a section
    is_f1: bool = False
    bulk_decode: bool = False
    paddings: tuple[int, ...] = ()  # --latent_paddings
    system_prompt: str | None = None
    # pictures made from control images, in place of clips: in caches, and in training samples
    one_frame: OneFrame | None = None
    rope_threshold: float | None = None  # the timestep from which on positions in a picture are multiplied
    rope_factor: float = 1.0  # by this
    text_multipliers: tuple[float, float] | None = None
    trained_guidance: float = 1.0  # embedded guidance that training feeds
    # generation: without a negative prompt it is empty; training samples: then no guidance
    negative_is_empty: bool = True
    options: Any = NO_OPTIONS  # of a training

    name: str = field(default="framepack", init=False)
    cache_tag: str = field(default="fp", init=False)
    lora_module: str = field(default="networks.lora_framepack", init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=FLOW, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)
    experts: tuple[float, ...] = field(default=(0.0,), init=False)

    @property
    def order(self) -> Order:
        """In which order sections are made, and what each sees."""
        return F1 if self.is_f1 else ANTI_DRIFTING

    @property
    def defaults(self) -> SamplingDefaults:
        """What a generation uses where nothing is said. The flow shift comes from the size."""
        return SamplingDefaults(
            steps=25,
            fps=float(FRAMES_PER_SECOND),
            guidance_scale=1.0,
            embedded_guidance=EMBEDDED_GUIDANCE,
            flow_shift=None,
            solver="unipc-bh1",
            width=256,
            height=256,
            frames=video_frames(USUAL_SECTIONS, self.window),
            noise_on_cpu=True,
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """How saved files name this model."""
        names = {"sd_model_name": self.files.dit, "vae_name": self.files.encoders.vae}
        return {
            "architecture": "framepack",
            "implementation": "https://github.com/lllyasviel/FramePack",
            "model_type": "framepack",
            "trained_for": "single pictures"
            if self.one_frame is not None
            else f"videos of FramePack{'-F1' if self.is_f1 else ''}",
            **{key: path.name for key, path in names.items() if path is not None},
        }

    # encoding

    def text_encoders(self) -> Sequence[TextEncoder]:
        """LLaVA's language model and CLIP-L; their files are opened when they are loaded."""
        given = self.files.encoders
        dtype = beside(given.text_dtype, self._dit_dtype())
        return [
            framepack_llama(
                given.text_encoder1_path,
                dtype,
                given.text_encoder1_tokenizer,
                self.system_prompt,
                in_fp8=given.llm_in_fp8,
            ),
            framepack_clip(given.text_encoder2_path, dtype, given.text_encoder2_tokenizer),
        ]

    @property
    def media_identity(self) -> Mapping[str, str]:
        """The encoders and switches that cached latents depend on."""
        return {
            **self.files.encoders.vae_identity(self._dit_dtype()),
            "image_encoder": fingerprint(self.files.image_encoder_path),
            "tile_frames": str(self.files.encoders.vae_tile_frames),
            "sections": self._kind_of_sections(),
        }

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """The VAE, and SigLIP where images are to be encoded."""
        dtype = self._dit_dtype()
        siglip = load_siglip(self.files.image_encoder_path, device, beside(None, dtype)) if images else None
        return MediaEncoders(self.files.encoders.load_vae(device, dtype), siglip)

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError where a table does not hold what is cached: long clips, or images with control
        images.
        """
        caching.check_table(table, self.one_frame is not None)

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        """How many sections a clip has. Raises MediaError where it is too short for one."""
        return None if self.one_frame is not None else caching.count_sections(table, frames)

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """The sections of every clip, or one file for every picture.

        Stored in the VAE's dtype, in model space.
        """
        parts = media.encoded_at_once(encoders.vae.device)
        if self.one_frame is not None:
            return [
                item for part in parts for item in caching.picture_entries(encoders, part, self.one_frame)
            ]
        return [item for part in parts for item in caching.clip_entries(encoders, part, self.order)]

    # the network

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """The transformer's checkpoint."""
        _ = self.files.dit_header()
        return (self.files.dit_path,)

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        """What the transformer computes in where no autocast says otherwise; its file is not loaded."""
        return kept_dtype(self.files.dit_header().block_dtype, placement)

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """The transformer."""
        dit = load_dit(self.files.dit_path, placement)
        if self.text_multipliers is not None:
            multiply_text(dit, FRAMEPACK_REFINER, *self.text_multipliers)
        return dit

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """What training gives `predict`: everything in the caches but the latents to learn, and guidance
        (B).
        """
        guidance = torch.full((len(latents),), GUIDANCE_UNIT * self.trained_guidance, device=latents.device)
        conditions = conditions_of(batch, self.files.dit_header().config, self.files.dit_path)
        compare_order(batch, self.is_f1, self.one_frame is not None)
        return {**conditions, "guidance": guidance}

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        """Velocity B C F H W in float32. cond: as caches name it, with guidance B.

        Timesteps are rounded to the dtype of the guidance: generation rounds both to what the model computes
        in, as the released code, training neither. Of a kind of history that has places and no latents, the
        latents are black.
        """

        def given(name: str) -> Tensor:
            value = cond[name]
            assert isinstance(value, Tensor)
            return sent(value, noisy.device)

        history: dict[str, Tensor] = {}
        for name, (latents, indices) in HISTORY.items():
            if indices in cond:
                places = given(indices)
                black = (*noisy.shape[:2], places.shape[1], *noisy.shape[3:])
                history[latents] = given(name).to(noisy.dtype) if name in cond else noisy.new_zeros(black)
                history[indices] = places
        guidance = given("guidance")
        timesteps = timesteps.to(guidance.dtype).float()
        return dit(
            noisy,
            timesteps,
            given("llama_vec"),
            given("llama_attention_mask"),
            given("clip_l_pooler"),
            guidance.float(),
            given("image_embeddings"),
            given("latent_indices"),
            **history,
            position_scale=position_scale(timesteps, self.rope_threshold, self.rope_factor),
            tweaks=tweaks,
        )

    # generation

    def prepare(self, request: Request) -> Request:
        """Fill what the request leaves open and check sizes, images and files. Nothing is loaded.

        Raises OptionError where an image is missing or what is asked for cannot be made, CheckpointError
        where a file is missing or of another kind.
        """
        if self.one_frame is not None:  # samples of a training of pictures
            request = replace(request, extra={"one_frame": "default", **request.extra})
        self.files.check_encoders()
        _ = self.files.image_encoder_path
        request = settled(request, self.defaults, LATENT, self.window, self.is_f1)
        if not self.is_f1:  # which takes none, as is said once for all videos
            tell_unused_paddings(self.paddings, request, sections_of(request, self.window))
        return with_negative(request, self.negative_is_empty)

    def prompts(self, request: Request) -> Mapping[int, Prompts]:
        """The texts of every section; the negative one is the same for all."""
        negative = Prompt(request.negative_prompt or "")
        texts = texts_of(request, sections_of(request, self.window))
        return {index: Prompts(Prompt(text), negative) for index, text in enumerate(texts)}

    def needs_media(self, request: Request) -> bool:
        """There always is an image."""
        return True

    def request_conditions(self, encoders: MediaEncoders, request: Request) -> Mapping[int, Conditions]:
        """What every section is given of the images, on the CPU."""
        if "one_frame" in request.extra:
            return one_frame_inputs(encoders, request)
        return video_inputs(encoders, request, sections_of(request, self.window))

    def sections(
        self,
        request: Request,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """One run of the denoising loop for each section, in the order of making; for a picture a single
        one.
        """
        guidance = torch.full(
            (1,), GUIDANCE_UNIT * (request.embedded_guidance or 0.0), dtype=self._dit_dtype()
        )
        if "one_frame" in request.extra:
            width, height, _ = request.size
            shape = LATENT.shape(1, height, width)
            return one_frame_section(
                request.extra["one_frame"], prompts[0], inputs[0], noise, guidance, self.window, shape
            )
        return video_sections(prompts, inputs, noise, guidance, self.order, self.window, self.paddings)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Pixels B 3 F H W in -1..1, chunk by chunk in playing order."""
        return decoded(encoders.vae, latents, self.window, self.bulk_decode)

    @property
    def caching_switches(self) -> tuple[str, ...]:
        """What fpack_cache_latents.py has to be told for what is trained."""
        return tuple(
            switch
            for switch, is_on in {"--f1": self.is_f1, "--one_frame": self.one_frame is not None}.items()
            if is_on
        )

    def _kind_of_sections(self) -> str:
        """Which caches are made, in words."""
        if self.one_frame is None:
            return "f1" if self.is_f1 else "anti-drifting"
        left_out = {"no 2x": not self.one_frame.has_2x, "no 4x": not self.one_frame.has_4x}
        return ", ".join(["one frame", *(name for name, is_so in left_out.items() if is_so)])

    def _dit_dtype(self) -> torch.dtype | None:
        """What the transformer computes in; None where there is none."""
        return None if self.files.dit is None else self.files.dit_header().compute_dtype


def family_for_latent_caching(options: FramePackLatentCachingOptions) -> FramePack:
    """For fpack_cache_latents.py."""
    encoders = replace(_tiled(Encoders().with_vae(options.vae)), vae_tile_frames=caching.WHOLE_FRAMES)
    one_frame = OneFrame(has_2x=not options.one_frame_no_2x, has_4x=not options.one_frame_no_4x)
    return FramePack(
        FramePackFiles(encoders=encoders, image_encoder=options.image_encoder),
        is_f1=options.f1,
        one_frame=one_frame if options.one_frame else None,
    )


def family_for_text_caching(options: FramePackTextCachingOptions) -> FramePack:
    """For fpack_cache_text_encoder_outputs.py."""
    return FramePack(FramePackFiles(encoders=Encoders().with_text(options.text)))


def family_for_training(options: FramePackTrainingOptions) -> FramePack:
    """For fpack_train_network.py. What is said of sections is for samples: the caches say what is trained."""
    options = replace(options, f1=options.f1 and not options.one_frame)  # ignored then, as was warned
    return FramePack(
        _all_files(options),
        window=options.latent_window_size,
        is_f1=options.f1,
        bulk_decode=options.bulk_decode,
        one_frame=OneFrame() if options.one_frame else None,
        trained_guidance=options.embedded_guidance,
        negative_is_empty=False,
        options=options,
    )


def family_for_generation(options: FramePackGenerationOptions) -> FramePack:
    """For fpack_generate_video.py."""
    if options.f1 and options.latent_paddings is not None:
        logger.warning(
            "--latent_paddings %s is ignored because --f1 makes a video from its start on",
            options.latent_paddings,
        )
    return FramePack(
        _all_files(options),
        window=options.latent_window_size,
        is_f1=options.f1,
        bulk_decode=options.bulk_decode,
        paddings=() if options.latent_paddings is None else parse_paddings(options.latent_paddings),
        system_prompt=options.custom_system_prompt,
        rope_threshold=options.rope_scaling_timestep_threshold,
        rope_factor=options.rope_scaling_factor,
        text_multipliers=options.text_multipliers,
    )


def _tiled(encoders: Encoders) -> Encoders:
    """FramePack's VAE is always tiled, as its clips are long."""
    return replace(encoders, vae_tile=encoders.vae_tile or VAE_TILE)


def _all_files(options: FramePackTrainingOptions | FramePackGenerationOptions) -> FramePackFiles:
    """The transformer and all encoders.

    What is decoded together is not cut in time: sections have transitions of their own.
    """
    encoders = _tiled(Encoders().with_vae(options.vae).with_text(options.text))
    return FramePackFiles(options.dit, replace(encoders, vae_tile_frames=UNCUT), options.image_encoder)


_: type[Family] = FramePack
