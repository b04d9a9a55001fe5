"""Wan2.1 and Wan2.2, described for the shared loops."""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from checkpoints.dits import with_dtype
from checkpoints.opening import fingerprint
from encoders.files import OneTransformer
from modules.errors import CacheError, DatasetError
from modules.media.pixels import to_pixels
from modules.options import NO_OPTIONS
from modules.speed_options import text_form
from protocols.data import (
    CAPTION,
    FIRST_FRAME,
    FRAME_INDICES,
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
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.family import FLOW, Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.inputs import IMAGE, LATENTS, VIDEO
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from protocols.rules import ONE_EXPERT, Expert, ModelRelease, ReferenceRules, SourceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section
from wan.bernini_options import BERNINI_EXTRAS, DEFAULT_TOPIC, SENTENCES
from wan.caching import (
    NO_BERNINI_MOMENTS,
    NO_MOMENTS,
    NO_VACE_MOMENTS,
    batch_conditions,
    encode_together,
    no_features,
)
from wan.checkpoints import load_dit, log_task_differences
from wan.configs import BERNINI, FUN_CONTROL, VACE
from wan.files import (
    WanFiles,
    caching_files,
    files_and_boundary,
    find_boundary,
    resolve_task,
    select_files,
)
from wan.inputs import (
    FIRST_LATENTS,
    appends_end,
    check_control,
    encode_inputs,
    keep_task_media,
    prepare_request,
)
from wan.names import LORA
from wan.options import (
    MASK,
    MAX_REFERENCES,
    ONE_FRAME,
    SCALE,
    WanGenerationOptions,
    WanLatentCachingOptions,
    WanTextCachingOptions,
    WanTrainingOptions,
)
from wan.spec import DIT, LATENT, LATENT_SPECS, SENTENCE_KEY, TEXT_KEYS, VACE_DIT
from wan.vae import normalize_latents

if TYPE_CHECKING:
    from protocols.workflows import ComfyModel

logger = logging.getLogger(__name__)

VACE_INPUTS = (("vace_control", "control"), ("vace_scales", "hint_scales"))  # condition, network argument
_EXTRAS = {VACE: (MASK, SCALE), BERNINI: BERNINI_EXTRAS}  # keys of `Request.extra`, by the kind of the task
VACE_REFERENCES = ReferenceRules(MAX_REFERENCES, clips=True, pad_with_white=True, control_masks=True)


@dataclass(frozen=True)
class Wan(OneTransformer):
    """Description of a Wan model for one run, built by the `family_for_...` functions below."""

    files: WanFiles
    # caching: i2v, flf2v, vace, bernini, one_frame, or None for text-to-video caches; training: one_frame for
    # samples
    condition_kind: str | None = None
    rope: str = "default"
    precision: torch.dtype = torch.float32  # dtype of time embedding, modulation and rotary embedding
    keep_file_dtypes: bool = False
    text_as_image_tokens: bool = False
    image_noise: float = 0.0
    options: Any = NO_OPTIONS  # set only in training
    boundary: float | None = None  # timestep from which on the high-noise expert works; None: there is none
    noise: NoiseSpec = FLOW  # set only in training

    abilities: ClassVar = Abilities(
        detects_few_steps=True,
        sampling_dit_option="--sample_dit_other",
        has_comfy_nodes=True,
        references="VACE takes it (cache with --vace, train with --task vace-1.3B, vace-14B or vace-A14B), "
        "and Bernini (cache with --bernini, train with --task bernini-1.3B or bernini-14B)",
    )
    name: str = field(default="wan", init=False)
    cache_tag: str = field(default="wan", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)

    @property
    def dit(self) -> DitSpec:
        """Names inside the transformer; VACE has a second list of blocks."""
        return VACE_DIT if self.files.task.kind == VACE else DIT

    def block_counts(self) -> tuple[int, ...]:
        """Return the number of blocks, and with VACE also of its second stack."""
        config = self.files.dit_header().config
        return (config.num_layers, config.vace_layers)[: len(self.dit.block_lists)]

    @property
    def latent(self) -> LatentSpec:
        """Latent space of the task.

        With one-frame inference, a sample has several latent frames although it generates a single image:
        one for each control image, and one for the image itself.
        """
        latent = LATENT_SPECS[self.files.task.kind]
        return replace(latent, in_sections=True) if self.condition_kind == ONE_FRAME else latent

    @property
    def references(self) -> ReferenceRules | None:
        """Rules for references in caches; None without VACE and Bernini, which check those of requests."""
        kinds = (self.condition_kind, self.files.task.kind)
        if BERNINI in kinds:
            from wan.bernini import REFERENCES  # only for Bernini

            return REFERENCES
        return VACE_REFERENCES if VACE in kinds else None

    @property
    def teacher_only_conditions(self) -> tuple[str, ...]:
        """Return the conditions that only a teacher gets: the caption, and for TI2V the first frame."""
        return (CAPTION, FIRST_FRAME) if self.files.task.takes_clean_first_frame else (CAPTION,)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The transformers that the options name. --dit alone serves all noise levels."""
        if self.files.dit_high_noise is None or self.boundary is None:
            return ONE_EXPERT
        both = _experts(self.boundary)
        return both[1:] if self.files.dit is None else both

    @property
    def defaults(self) -> SamplingDefaults:
        """Steps, guidance, flow shift and frames of the task, and the size of training samples."""
        task = self.files.task
        high_noise_guidance = task.high_noise_guidance
        expert_guidance = {} if high_noise_guidance is None else {HIGH_NOISE: high_noise_guidance}
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
            expert_guidance=expert_guidance,
            experts=ONE_EXPERT if self.boundary is None else _experts(self.boundary),
            extras=(ONE_FRAME, *_EXTRAS.get(task.kind, ())),
        )

    @property
    def release(self) -> ModelRelease:
        """Repositories and license of the task's released model."""
        licence = "Apache-2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"
        return ModelRelease(self.files.task.repositories, *licence)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the model: version, task, and the names of one or two transformer files."""
        names = {
            "architecture": f"wan{self.files.task.version}",
            "implementation": f"https://github.com/Wan-Video/Wan{self.files.task.version}",
            "model_type": "wan",
            "task": self.files.task.name,
        }
        if self.files.dit_high_noise is not None:
            key = "sd_model_name" if self.files.dit is None else "sd_model_name_high_noise"
            names[key] = self.files.dit_high_noise.name
        if self.files.task.kind == BERNINI:
            names["trained_for"] = "Bernini-R"
        return self.add_file_names(names)

    # encoding

    @property
    def media_identity(self) -> Mapping[str, str]:
        """What caches depend on: the VAE and, with an image condition, its kind and the image encoder."""
        identity = dict(self.files.vae_identity())
        if self.condition_kind is not None:
            clip = {} if self.files.clip is None else {"clip": fingerprint(self.files.clip_path)}
            identity |= {**clip, "image": self.condition_kind}
        return identity

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Load the VAE and, for tasks with image features, the CLIP image encoder."""
        files = self.files
        wants_image = (
            files.clip is not None if self.condition_kind is not None else self.files.task.uses_clip_features
        )
        clip = None
        if images and wants_image:
            from wan.clip import load_clip  # only for images

            clip = load_clip(files.clip_path, device)
        return MediaEncoders(files.load_vae(device), clip)

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table's control media do not fit the kind of model to cache for."""
        if self.condition_kind == ONE_FRAME:
            from wan import one_frame  # only for single images

            one_frame.check_table(table, self.files.clip is not None)
        elif table.has_control and len(table.clean_indices) > 1:
            raise DatasetError(
                f"{table.name}: Wan uses one control video or image for each item, but fp_1f_clean_indices "
                f"asks for {len(table.clean_indices)}. Remove fp_1f_clean_indices, or pass --one_frame."
            )
        elif table.has_control and self.files.task.kind == "ti2v":
            raise DatasetError(
                f"{table.name}: Wan2.2 TI2V-5B does not use control videos. Remove the table's "
                "control_directory or control_path, or cache with the VAE of another model."
            )
        elif self.condition_kind == VACE and not (table.has_control or table.has_references):
            raise DatasetError(
                f"{table.name}: --vace needs control media or references. Set control_directory or "
                "reference_directory; for text-to-video LoRAs cache without --vace, and train --task t2v-..."
            )

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode every clip as latents, with its control video if there is one.

        With an image kind, the CLIP features and the image condition are added. Latents are stored in the
        VAE's dtype, CLIP features in float16, as in the caches of other trainers.
        """
        dtype = self.files.encoder_dtype(self.files.vae_dtype)
        entries = []
        for part in media.split_for(encoders.vae.device):
            entries += encode_together(encoders, part, dtype, self.condition_kind)
        return [[entry] for entry in entries]

    @property
    def moments(self) -> MomentsRules:
        """Rules for moments: caches with an image condition or VACE need pixels and cannot use them."""
        rejections = {None: None, VACE: NO_VACE_MOMENTS, BERNINI: NO_BERNINI_MOMENTS}
        return MomentsRules(rejections.get(self.condition_kind, NO_MOMENTS))

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        """Return the normalized means of the posteriors: no sample is drawn, as for encoded clips."""
        dtype = self.files.encoder_dtype(self.files.vae_dtype)
        latents = normalize_latents(media.moments.float().chunk(2, dim=1)[0]).to(dtype)
        return [CacheEntry({"latents": latent}) for latent in latents]

    # the network

    @property
    def has_dit_files(self) -> bool:
        """Whether options name an expert."""
        return self.files.dit is not None or self.files.dit_high_noise is not None

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """Transformer files in the order of the experts, checked against --task."""
        self.files.check_dits()
        return self.files.dits

    def file_beside(self, dit: Path) -> Path | None:
        """Return the separate file with VACE's blocks for a transformer file; None if there is none."""
        return self.files.find_vace(dit)

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer of an expert, with VACE's blocks from their own file if there is one."""
        path = self.dit_files[expert]
        log_task_differences(self.files.dit_header(), self.files.task, path, self.compute_dtype(placement))
        placement = with_dtype(placement, self.files.dit_dtype)
        placement = replace(placement, keep_file_dtypes=self.keep_file_dtypes)
        return load_dit(path, placement, self.rope, self.precision, second_file=self.files.find_vace(path))

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions of a batch: text and, by task, `condition_latents` and CLIP features."""
        if self.condition_kind == ONE_FRAME and FRAME_INDICES not in batch.tensors:
            from wan.one_frame import warn_about_cached_videos  # only for single images

            warn_about_cached_videos()
        zeros_on = latents.device if self._feature_zeros else None
        config = self.files.dit_header().config
        if self.files.task.kind == BERNINI:
            self._check_sentence(batch)
        conditions = batch_conditions(self.files.task, config, batch, zeros_on)
        batch.check_widths({"t5": config.text_dim}, self.files.dits[0], "wan_cache_text_encoder_outputs.py")
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

        The conditions are t5 (n D for each sample: its text), clip (B T 1280: features of images),
        condition_latents (B C F H W: channels after the noisy ones), and more for VACE and single images.
        """
        # image and control conditions are additional input channels
        condition = cond.get("condition_latents")
        if isinstance(condition, Tensor):
            noisy = torch.cat([noisy, condition.to(noisy)], dim=1)
        arguments: dict[str, Any] = {}
        for name, argument in VACE_INPUTS:  # name of the condition, and of the network's argument
            tensor = cond.get(name)
            if isinstance(tensor, Tensor):
                arguments[argument] = tensor.to(noisy.device)
        if self.files.task.kind == BERNINI:
            from wan.bernini import list_sources  # only for Bernini

            arguments["sources"] = list_sources(cond, overrides.max_references, noisy.device)
        positions = cond.get(FRAME_INDICES)
        if isinstance(positions, Tensor):  # on the host, the same for all samples
            arguments["frame_positions"] = tuple(positions[0].tolist())
        clip = cond.get("clip")
        features = clip.to(noisy.device) if isinstance(clip, Tensor) else None
        if overrides.nag is not None:
            # the network names its text input `text`
            overrides = overrides.rename_nag(lambda texts: {"text": texts["t5"]})
        return dit(noisy, timesteps, cond["t5"], features, overrides=overrides, **arguments)

    def _check_sentence(self, batch: Batch) -> None:
        """Raise CacheError if captions have a sentence of Bernini and --bernini_prompt says none, or not."""
        for cache in batch.cache_origins:
            if cache.part != "t5":
                continue
            cached = cache.encoder.get(SENTENCE_KEY, "")
            if bool(cached) != bool(self.files.sentence):
                raise CacheError(
                    f"{cache.path}: its caption was encoded {'with' if cached else 'without'} a sentence of "
                    "Bernini in front. Cache again with wan_cache_text_encoder_outputs.py --bernini_prompt "
                    f"{self.options.bernini.bernini_prompt}, or train with --bernini_prompt "
                    f"{'v2v' if cached else 'none'}."
                )

    # generation

    def check_files(self, media: bool) -> None:
        """Check the transformers and text encoder, and with `media` also the VAE and the image encoder."""
        self.files.check(("dit", "texts", *(("vae", "clip") if media else ())))

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request for the task: media, size, frames, flow shift and control.

        If single images are trained, samples are single images too, which `wan.one_frame` prepares.
        """
        task = self.files.task
        self.files.check_dits()
        settings: dict[str, Any] = {"defaults": self.defaults, "latent": self.latent, "experts": self.experts}
        if self.condition_kind == ONE_FRAME:  # samples of a training run of images
            request = replace(request, extra={ONE_FRAME: "default", **request.extra})
        if ONE_FRAME in request.extra:
            from wan import one_frame  # only for single images

            self.files.check(("dit", "clip"))
            return one_frame.prepare(task, request, **settings)
        vace_request = None
        if task.kind == VACE:
            from wan.vace import read_vace_request  # only for VACE

            # control media are removed from the request, and added to the prepared one below
            request, vace_request = read_vace_request(request, self.files.dit_header().config.vace_layers)
        request = keep_task_media(task, request)
        self.files.check(("dit", "clip"))
        prepared = prepare_request(task, request, **settings)
        if prepared.request.control_path is not None:
            check_control(task, prepared, prepared.request.control_path)
        if task.kind == BERNINI:
            from wan.bernini import read_bernini_request  # only for Bernini

            topic = None if self.options is NO_OPTIONS else self.options.bernini.bernini_prompt
            return read_bernini_request(prepared.request, topic, prepared.frames == 1).add_to(prepared)
        return prepared if vace_request is None else vace_request.add_to(prepared)

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether the task takes an image or control video, or the request starts from an image."""
        task = self.files.task
        request = prepared.request
        keeps_one = task.takes_clean_first_frame and request.image_path is not None
        has_sources = task.kind == BERNINI and bool(request.control_path or request.control_images)
        return task.requires_image or task.has_control or keeps_one or has_sources or task.kind == VACE

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode images and control video as CLIP features and condition channels, B ..., on the CPU."""
        if self.files.task.kind == VACE:
            from wan.vace import encode_control  # only for VACE

            return {0: encode_control(encoders.vae, prepared)}
        if self.files.task.kind == BERNINI:
            from wan import bernini  # only for Bernini

            return {0: bernini.encode_request(encoders.vae, prepared)}
        if ONE_FRAME in prepared.request.extra:
            from wan.one_frame import encode_request  # only for single images

            return {0: encode_request(encoders, prepared, self.files.task)}
        conditions = encode_inputs(encoders, prepared, self.files.task)
        zeros = no_features(self.files.dit_header().config, 1) if self._feature_zeros else {}
        return {0: zeros | conditions}

    @property
    def source(self) -> SourceRules:
        """Rules for what denoising may start from; with a task for images it is an image."""
        task = self.files.task
        takes = {VIDEO: task.frames != 1, IMAGE: not task.requires_image, LATENTS: True}
        return SourceRules(
            tuple(option for option, is_taken in takes.items() if is_taken),
            f"--task {task.name}",
            stretch_frames=True,
            compatible_models=frozenset({"wan"}),
        )

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames as normalized means of the posterior; `seed` is unused, as no sample is drawn."""
        return encoders.vae.encode(to_pixels(frames))

    def comfy_model(self) -> "ComfyModel":
        """Return the task's ComfyUI workflow settings; raise OptionError if it starts from more than text."""
        from wan.workflow import find_comfy_model  # only with --save_workflow

        return find_comfy_model(self.files.task, takes_images=self.condition_kind == ONE_FRAME)

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section to the denoising loop, which sends back latents; return those of the video.

        1. Draw the start noise of all frames, including frames that are cut off at the end.
        2. With `image_noise`, draw noise for the image's condition, which adds motion.
        3. Pass an image that is the video's first frame to the section as a clean frame.
        """
        request = prepared.request
        batch, channels, frames, *area = self.latent.shape(prepared.frames, prepared.height, prepared.width)
        is_one_frame = ONE_FRAME in request.extra
        # a frame for each control image precedes the clip and is cut off at the end: references of VACE or
        # control images of a single image
        num_leading = 0 if self.files.task.kind == BERNINI else len(request.control_images)
        frames += num_leading
        # an end image is one more latent frame after the video
        if not is_one_frame and appends_end(self.files.task, request):
            frames += 1
        start = noise.draw((batch, channels, frames, *area))
        conditions = dict(inputs.get(0, {}))
        first_latents = conditions.pop(FIRST_LATENTS, None)
        if self.image_noise and self.files.task.requires_image:
            condition = conditions["condition_latents"]
            assert isinstance(condition, Tensor)
            conditions["condition_latents"] = self._add_image_noise(condition, noise)
            del condition  # otherwise this generator would hold it during the denoising
        section = prompts[0].section(start, conditions)
        if isinstance(first_latents, Tensor):
            section = replace(
                section,
                clean_frames=first_latents,
                overrides=Overrides(num_clean_frames=first_latents.shape[2]),
            )
        latents = yield section
        if is_one_frame:
            return latents[:, :, prepared.family_settings.target_index].unsqueeze(2)
        return latents[:, :, num_leading:]

    def _add_image_noise(self, condition: Tensor, noise: NoiseSource) -> Tensor:
        """Return the condition with noise on the image's channels, which are the last ones."""
        image = LATENT.channels
        # drawn for all channels so that seeds give the noise of existing tools
        drawn = noise.draw(condition.shape)[:, -image:].to(condition)
        noisy = condition[:, -image:] + self.image_noise * drawn
        return torch.cat([condition[:, :-image], noisy], dim=1)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels, one frame and then four at a time."""
        yield from encoders.vae.decode(latents.to(encoders.vae.device))

    @property
    def _feature_zeros(self) -> bool:
        """Whether a Fun-Control model without an image gets zero features, as in its official pipeline."""
        return self.files.task.model_kind == FUN_CONTROL and not self.text_as_image_tokens


def family_for_latent_caching(options: WanLatentCachingOptions) -> Wan:
    """Build the model description for wan_cache_latents.py; the VAE decides whose latents are cached."""
    return Wan(*caching_files(options))


def family_for_text_caching(options: WanTextCachingOptions) -> Wan:
    """Build the model description for wan_cache_text_encoder_outputs.py, which needs only umT5."""
    text = options.text
    sentence = SENTENCES[options.bernini.bernini_prompt or "none"]
    files = WanFiles(t5=text.t5, t5_tokenizer=text.t5_tokenizer, t5_form=text_form(text), sentence=sentence)
    return Wan(files, condition_kind=VACE)  # captions may belong to items with references


def family_for_training(options: WanTrainingOptions) -> Wan:
    """Build the model description for wan_train_network.py and Wan's other training scripts."""
    options = resolve_task(options)
    files = select_files(options)
    topic = options.bernini.bernini_prompt
    if files.task.kind == BERNINI:
        topic = topic or DEFAULT_TOPIC
        options = replace(options, bernini=replace(options.bernini, bernini_prompt=topic))
        files = replace(files, sentence=SENTENCES[topic])
    elif topic is not None:
        logger.warning("--bernini_prompt is ignored because --task %s is not Bernini's", files.task.name)
    # the task's default is filled in here, because the value is recorded and compared later
    if options.first_frame_probability is None:
        options = replace(options, first_frame_probability=files.task.first_frame_probability)
    return Wan(
        files,
        rope=options.rope_func,
        keep_file_dtypes=options.mixed_precision_transformer,
        text_as_image_tokens=options.text_as_image_tokens,
        condition_kind=ONE_FRAME if options.one_frame else None,
        boundary=find_boundary(options, files),
        noise=replace(FLOW, first_frame_probability=options.first_frame_probability or 0.0),
        options=options,
    )


def family_for_samples(options: WanTrainingOptions) -> Wan | None:
    """Build the model description for samples from a transformer that is not trained (--sample_dit_other).

    Returns None if the option is not given.
    """
    sample_dit, experts = options.sample_dit_other, options.experts
    if sample_dit is None:
        return None
    if experts.dit_high_noise is None:
        experts = replace(experts, dit_high_noise=sample_dit)
        return family_for_training(replace(options, experts=experts, sample_dit_other=None))
    return family_for_training(replace(options, dit=sample_dit, sample_dit_other=None))


def family_for_generation(options: WanGenerationOptions) -> Wan:
    """Build the model description for wan_generate_video.py, with missing files from --ckpt_dir."""
    options = resolve_task(options)
    files, boundary = files_and_boundary(options)
    for name in BERNINI_EXTRAS:
        if files.task.kind != BERNINI and getattr(options.bernini, name) is not None:
            logger.warning("--%s is ignored because --task %s is not Bernini's", name, files.task.name)
    if options.i2v_extra_noise and not files.task.requires_image:
        logger.warning("--i2v_extra_noise is ignored because --task %s has no image channels", options.task)
    return Wan(
        files,
        rope=options.rope_func,
        keep_file_dtypes=options.mixed_precision_transformer,
        text_as_image_tokens=options.text_as_image_tokens,
        boundary=boundary,
        image_noise=options.i2v_extra_noise or 0.0,
        precision=torch.float16 if options.lower_precision_attention else torch.float32,
    )


def _experts(boundary: float) -> tuple[Expert, Expert]:
    return Expert(LOW_NOISE, 0.0, boundary), Expert(HIGH_NOISE, boundary)


_: type[Family] = Wan
