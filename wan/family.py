"""Wan2.1 and Wan2.2, described for the shared loops."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.checkpoints.dits import choose_dtype, with_dtype
from modules.checkpoints.opening import fingerprint
from modules.contract.data import (
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
from modules.contract.family import FLOW, DitSpec, Family, NoiseSource, NoiseSpec, TextEncoder
from modules.contract.loading import Placement
from modules.contract.requests import Prepared, Request
from modules.contract.rules import (
    HIGH_NOISE,
    IMAGE,
    LATENTS,
    LOW_NOISE,
    ONE_EXPERT,
    VIDEO,
    Expert,
    ModelRelease,
    SourceRules,
)
from modules.contract.steps import NO_TWEAKS, EncodedPrompts, Section, Tweaks
from modules.devices import dtype_name
from modules.media.pixels import to_pixels
from modules.options import NO_OPTIONS
from wan.caching import (
    batch_conditions,
    check_controls,
    encode_together,
    moments_rules,
    no_features,
    normalise_moments,
)
from wan.checkpoints import load_dit, note_task
from wan.clip import load_clip
from wan.configs import TASKS, WanTask
from wan.files import (
    WanFiles,
    boundary_of,
    caching_task,
    files_and_boundary,
    files_of,
    network_settings,
    vae_settings,
)
from wan.inputs import (
    FIRST_LATENTS,
    add_image_noise,
    appends_end,
    encode_inputs,
    prepare_request,
    take_inputs,
)
from wan.options import (
    WanGenerationOptions,
    WanLatentCachingOptions,
    WanTextCachingOptions,
    WanTrainingOptions,
)
from wan.spec import DIT, LATENT, LATENT_5B
from wan.t5 import WanTextEncoder
from wan.vae import load_vae

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wan:
    """Description of a Wan model for one run, built by the `family_for_...` functions below."""

    task: WanTask
    files: WanFiles
    vae_dtype: torch.dtype | None = None  # None: the DiT's when there is one, else bfloat16
    dit_dtype: torch.dtype | None = None  # None: as the file says
    vae_cache_cpu: bool = False
    vae_tile: int | None = None
    image_kind: str | None = None  # caching: i2v, flf2v, or None for text-to-video caches
    rope: str = "default"
    precision: torch.dtype = torch.float32  # of time embedding, modulation and rotation by position
    keep_file_dtypes: bool = False
    text_as_image_tokens: bool = False
    t5_in_fp8: bool = False
    image_noise: float = 0.0
    # generation: the video takes the image's aspect; training samples: the image is cropped
    sizes_follow_image: bool = True
    options: Any = NO_OPTIONS  # of a training
    boundary: float | None = None  # timestep from which on the high-noise expert works; None: there is none
    first_frame_probability: float = 0.0  # of a training, see `NoiseSpec`

    name: str = field(default="wan", init=False)
    cache_tag: str = field(default="wan", init=False)
    lora_module: str = field(default="networks.lora_wan", init=False)
    dit: DitSpec = field(default=DIT, init=False)
    text_keys: frozenset[str] = field(default=WanTextEncoder.keys, init=False)

    @property
    def latent(self) -> LatentSpec:
        """The latent space of the task's VAE."""
        return _latent_of(self.task)

    @property
    def noise(self) -> NoiseSpec:
        """Rectified flow; how often training gives the first frame."""
        return replace(FLOW, first_frame_probability=self.first_frame_probability)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The transformers that are given: a single one is for all noise levels if it is --dit."""
        if self.files.dit_high_noise is None or self.boundary is None:
            return ONE_EXPERT
        low, high = _experts(self.boundary)
        return (high,) if self.files.dit is None else (low, high)

    @property
    def defaults(self) -> SamplingDefaults:
        """Defaults of a generation of the task."""
        task = self.task
        return SamplingDefaults(
            steps=task.steps,
            fps=task.fps,
            guidance_scale=task.guidance,
            embedded_guidance=None,
            flow_shift=task.flow_shift,
            solver="unipc",
            width=256,
            height=256,
            frames=task.frames,
            expert_guidance={}
            if task.high_noise_guidance is None
            else {HIGH_NOISE: task.high_noise_guidance},
            experts=ONE_EXPERT if self.boundary is None else _experts(self.boundary),
        )

    @property
    def release(self) -> ModelRelease:
        """Where the task's model comes from."""
        return self.task.release

    @property
    def metadata(self) -> Mapping[str, str]:
        """Name of this model in saved files."""
        files = self.files
        names = {"sd_model_name": files.dit or files.dit_high_noise, "vae_name": files.vae}
        if files.dit is not None:
            names["sd_model_name_high_noise"] = files.dit_high_noise
        return {
            "architecture": f"wan{self.task.version}",
            "implementation": f"https://github.com/Wan-Video/Wan{self.task.version}",
            "model_type": "wan",
            "task": self.task.name,
            **{key: path.name for key, path in names.items() if path is not None},
        }

    # encoding

    def check_given_files(self) -> None:
        """Check every file that an option names, needed or not. Loads nothing."""
        self._check_encoders()
        self.files.check_tokenizer()
        if self.files.has_dit:
            self._check_dit()

    def text_encoders(self) -> Sequence[TextEncoder]:
        """Return umT5; its file is opened when it is loaded."""
        return [WanTextEncoder(self.files.t5_path, self.files.t5_tokenizer, self.t5_in_fp8)]

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Encoders and switches that cached latents depend on."""
        identity = {
            "vae": fingerprint(self.files.vae_path),
            "vae_dtype": dtype_name(self._vae_dtype()),
            "tile": str(self.vae_tile),
        }
        if self.image_kind is not None:
            clip = {} if self.files.clip is None else {"clip": fingerprint(self.files.clip_path)}
            identity |= {**clip, "image": self.image_kind}
        return identity

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Load the VAE; with `images` also the image encoder, if the model or the cache needs it."""
        vae = load_vae(
            self.files.vae_path,
            device,
            self._vae_dtype(),
            cache_on_cpu=self.vae_cache_cpu,
            tile=self.vae_tile,
        )
        wants_image = self.files.clip is not None if self.image_kind is not None else self.task.has_features
        return MediaEncoders(vae, load_clip(self.files.clip_path, device) if images and wants_image else None)

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if an item has a control image or video that cannot be used."""
        check_controls(self.task, table)

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        """Return None: an item has one file."""
        return None

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode every clip as latents, and its control video if there is one.

        With an image kind, also return the CLIP features and the image condition. Stored in the VAE's dtype,
        CLIP features in float16, as in the caches of other tuners.
        """
        parts, store = media.split_for(encoders.vae.device), self._vae_dtype()
        return [
            [entry] for part in parts for entry in encode_together(encoders, part, store, self.image_kind)
        ]

    @property
    def moments(self) -> MomentsRules:
        """Return the rules for cached moments: enough unless an image's conditions are cached too."""
        return moments_rules(self.image_kind)

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        """Return normalised means of the posteriors: no sample is drawn, as for clips encoded here."""
        return normalise_moments(media, self._vae_dtype())

    # the network

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """Paths of the transformers' checkpoints, checked against --task."""
        self._check_dit()
        return self.files.dits

    def block_counts(self) -> tuple[int, ...]:
        """Return the number of blocks; the file's header says it."""
        return (self.files.dit_header().config.num_layers,)

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        """Return the dtype that the transformer computes in without autocast; its file is not loaded."""
        return choose_dtype(self.files.dit_header().block_dtype, with_dtype(placement, self.dit_dtype))

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer of an expert, checked against --task."""
        path = self.dit_files[expert]
        note_task(self.files.dit_header(), self.task, path, self.compute_dtype(placement))
        placement = with_dtype(placement, self.dit_dtype)
        placement = replace(placement, keep_file_dtypes=self.keep_file_dtypes)
        return load_dit(path, placement, self.rope, self.precision)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions for training: text, by task CLIP features, `condition_latents` B C F H W."""
        zeros_on = latents.device if self._feature_zeros else None
        return batch_conditions(self.task, self.files.dit_header().config, batch, zeros_on)

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        """Predict the velocity, B C F H W in float32.

        cond: t5 (list of n D), clip (B T 1280), condition_latents (B C F H W).
        """
        device = noisy.device

        def given(texts: Conditions) -> Conditions:
            return {"text": [embeds.to(device) for embeds in texts["t5"]]}

        extra, clip = cond.get("condition_latents"), cond.get("clip")
        if isinstance(extra, Tensor):
            noisy = torch.cat([noisy, extra.to(noisy)], dim=1)
        features = clip.to(device) if isinstance(clip, Tensor) else None
        return dit(noisy, timesteps, given(cond)["text"], features, tweaks.rename_away(given))

    # generation

    def check_files(self, media: bool) -> None:
        """Check the files that the task needs. media: also those of the VAE and the image encoder.

        Raises OptionError if one is not given, CheckpointError if it is missing, of another kind, or does not
        fit --task.
        """
        self._check_dit()
        images = ("clip",) if self.task.has_features else ()
        self._check_encoders("t5", *(("vae", *images) if media else ()))

    def prepare(self, request: Request) -> Prepared:
        """Fill open fields of the request, settle the size, and check files and images. Nothing is loaded.

        Raises OptionError if a needed image or control video is missing or a size cannot be made,
        CheckpointError if a file is missing or does not fit --task.
        """
        self._check_dit()
        request = take_inputs(self.task, request)
        self._check_encoders(*(("clip",) if self.task.has_features else ()))
        given = self.task, request, self.defaults, self.latent, self.experts
        return prepare_request(*given, follows_image=self.sizes_follow_image)

    def needs_media(self, prepared: Prepared) -> bool:
        """Whether images or a control video must be encoded before denoising."""
        keeps_one = self.task.keeps_image and prepared.asked.image_path is not None
        return self.task.takes_image or self.task.has_control or keeps_one

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the request's images and control video as CLIP features and condition channels.

        On the CPU, with a batch dimension.
        """
        conditions = encode_inputs(encoders, prepared, self.task, stretched=self.sizes_follow_image)
        return {0: self._no_image(1) | conditions}

    @property
    def source(self) -> SourceRules:
        """Return the rules for starts of denoising: a picture's task starts from a picture."""
        makes_picture, starts_from_noise = self.task.frames == 1, not self.task.takes_image
        takes = {VIDEO: not makes_picture, IMAGE: starts_from_noise, LATENTS: True}
        return SourceRules(
            tuple(option for option, is_taken in takes.items() if is_taken),
            f"--task {self.task.name}",
            stretches=True,
            latents_of=frozenset({"wan"}),
        )

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames 1 F H W 3 uint8 as the means of the posterior, 1 C f h w."""
        return encoders.vae.encode(to_pixels(frames))

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the one section for the denoising loop.

        Noise is one draw of C F H W; the condition's extra noise is drawn after it. An image that is the
        first frame of the video is given to the section.
        """
        batch, channels, latent_frames, rows, columns = self.latent.shape(
            prepared.frames, prepared.height, prepared.width
        )
        start = noise.draw(
            (batch, channels, latent_frames + appends_end(self.task, prepared.asked), rows, columns)
        )
        conditions = dict(inputs.get(0, {}))
        first = conditions.pop(FIRST_LATENTS, None)
        if self.image_noise and self.task.takes_image:
            conditions |= add_image_noise(conditions, self.image_noise, noise)
        section = prompts[0].section(start, conditions)
        if isinstance(first, Tensor):
            section = replace(section, given=first, tweaks=Tweaks(given_frames=first.shape[2]))
        return (yield section)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Decode to pixels B 3 F H W in -1..1, chunk by chunk in playing order."""
        yield from encoders.vae.decode(latents.to(encoders.vae.device))

    # shared by the above

    def _check_encoders(self, *needed: str) -> None:
        """Check the encoders' files, and that the VAE is that of the task's latents."""
        self.files.check_encoders(*needed)
        self.files.check_vae(self.latent, f"--task {self.task.name}")

    def _check_dit(self) -> None:
        self.files.check_dits(self.task)

    def _vae_dtype(self) -> torch.dtype:
        if self.vae_dtype is not None:
            return self.vae_dtype
        if not self.files.has_dit:
            return torch.bfloat16
        return self.dit_dtype or self.files.dit_header().compute_dtype

    @property
    def _feature_zeros(self) -> bool:
        """Whether a Fun-Control model without an image gets zero features, as in its official pipeline."""
        return self.task.model_kind == "fun-control" and not self.text_as_image_tokens

    def _no_image(self, batch_size: int) -> dict[str, Tensor | list[Tensor]]:
        return no_features(self.files.dit_header().config, batch_size) if self._feature_zeros else {}


def family_for_latent_caching(options: WanLatentCachingOptions) -> Wan:
    """Describe the family for wan_cache_latents.py: the file of the VAE tells whose latents are made.

    Raises OptionError for switches that those latents have no use for.
    """
    files = WanFiles(vae=options.vae.vae, clip=options.clip)
    task, image_kind = caching_task(options, files)
    return Wan(task, files, **vae_settings(options, torch.bfloat16), image_kind=image_kind)


def family_for_text_caching(options: WanTextCachingOptions) -> Wan:
    """Describe the family for wan_cache_text_encoder_outputs.py."""
    files = WanFiles(t5=options.text.t5, t5_tokenizer=options.text.t5_tokenizer)
    return Wan(TASKS["t2v-14B"], files, t5_in_fp8=options.text.fp8_t5)


def family_for_training(options: WanTrainingOptions) -> Wan:
    """Describe the family for wan_train_network.py; samples have exactly the size of their prompt line."""
    files = files_of(options)
    task = TASKS[options.task]
    if options.first_frame_probability is None:  # what was trained with is recorded and compared
        options = replace(options, first_frame_probability=task.first_frame_probability)
    return Wan(
        task,
        files,
        **vae_settings(options, None),
        **network_settings(options),
        boundary=boundary_of(options, task, files),
        sizes_follow_image=False,
        first_frame_probability=options.first_frame_probability or 0.0,
        options=options,
    )


def family_for_samples(options: WanTrainingOptions) -> Wan | None:
    """Describe the family for samples made with a transformer that is not trained (--sample_dit_other).

    None if there is none.
    """
    if options.sample_dit_other is None:
        return None
    experts = options.experts
    if experts.dit_high_noise is None:
        high = replace(experts, dit_high_noise=options.sample_dit_other)
        return family_for_training(replace(options, experts=high, sample_dit_other=None))
    return family_for_training(replace(options, dit=options.sample_dit_other, sample_dit_other=None))


def family_for_generation(options: WanGenerationOptions) -> Wan:
    """Describe the family for wan_generate_video.py; --ckpt_dir provides the files that are not given."""
    task = TASKS[options.task]
    files, boundary = files_and_boundary(options, _latent_of(task))
    if options.i2v_extra_noise and not task.takes_image:
        logger.warning("--i2v_extra_noise is ignored because --task %s has no image channels", task.name)
    return Wan(
        task,
        files,
        **vae_settings(options, None),
        **network_settings(options),
        boundary=boundary,
        image_noise=options.i2v_extra_noise or 0.0,
        precision=torch.float16 if options.lower_precision_attention else torch.float32,
    )


def _experts(boundary: float) -> tuple[Expert, Expert]:
    return Expert(LOW_NOISE, 0.0), Expert(HIGH_NOISE, boundary)


def _latent_of(task: WanTask) -> LatentSpec:
    return LATENT_5B if task.kind == "ti2v" else LATENT


_: type[Family] = Wan
