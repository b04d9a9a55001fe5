"""MiniMax-H3, described for the shared loops: video with audio."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders.files import OneTransformer
from minimax_h3.audio import H3AudioVae
from minimax_h3.cache_marks import KEY, TAGS, TEXTS_AGAIN, check_texts, read_empty_prompt
from minimax_h3.cached_texts import make_text_caching_files
from minimax_h3.caching import H3Caching, encode_target, make_caching
from minimax_h3.conditions import (
    CONTROL_INDICES,
    FIRST,
    LAST,
    TARGET_INDEX,
    PositionedConditions,
    add_noise_to_conditions,
    control_key,
    encode_condition,
    get_token_grid,
    position_conditions,
    reference_key,
)
from minimax_h3.configs import DIT, FEW_STEPS, NOISE, RELEASE
from minimax_h3.dit_checkpoints import STACKED
from minimax_h3.files import UNDECIDED, H3Files, make_model_files
from minimax_h3.names import LORA
from minimax_h3.options import (
    FPS,
    FRAMES,
    FREQUENCIES_KEY,
    LAYOUT_KEY,
    MAX_FRAMES,
    MIN_FRAMES,
    NAME,
    SIZE,
    STEPS,
    H3FullTrainingOptions,
    H3GenerationOptions,
    H3LatentCachingOptions,
    H3TextCachingOptions,
    H3TrainingOptions,
    canvas,
    check_guidance,
    check_ratio,
)
from minimax_h3.presentation import AUDIO, IMAGE, IMAGE_TAG, VIDEO
from minimax_h3.reference_options import (
    IMAGE_EDGE,
    REFERENCE_MEDIA_KEYS,
    TASK,
    VIDEO_EDGE,
    warn_about_unused_edges,
)
from minimax_h3.reference_sound import read_reference_audio
from minimax_h3.references import (
    ClipSource,
    H3Media,
    H3Reference,
    H3Sources,
    ImageSource,
    check_video_length,
    cut_to_vae_length,
    keyframe_sources,
    read_media,
    reference_clip,
    reference_image,
)
from minimax_h3.training_inputs import (
    CLEAN_FRACTIONS,
    CleanFractions,
    add_noise_to_inputs,
    media_conditions,
    read_clean_fractions,
    teacher_key,
    teacher_rows,
)
from minimax_h3.video_vae import H3VideoVae
from modules.devices import send
from modules.errors import CacheError, OptionError
from modules.media.pixels import byte_clips
from modules.media.reading import image_size
from modules.options import NO_OPTIONS
from protocols import rules
from protocols.data import (
    Audio,
    AudioSpec,
    AudioVideoShapes,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
)
from protocols.family import Abilities, DitSpec, Family, HearsAudio, NoiseSource, NoiseSpec
from protocols.inputs import CLIP, FIRST_LAST, SOURCES, SUBJECT
from protocols.requests import (
    NO_MEDIA,
    Prepared,
    Prompts,
    Request,
    check_size,
    get_size,
    keep_usable_media,
    resolve_request,
)
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

AUDIO_SHIFT_KEY = "h3_shift_audio"  # in Request.extra
SOLVER = "euler"


USABLE = {**NO_MEDIA, "image_path": True, "end_image_path": True}


@dataclass(frozen=True)
class H3Request:
    """Media that condition a clip, and how to read them."""

    media: H3Media
    sources: H3Sources


@dataclass(frozen=True)
class MiniMaxH3(OneTransformer):
    """Description of MiniMax-H3 for one run, built by the `family_for_...` functions below."""

    files: H3Files
    noise: NoiseSpec = NOISE
    audio_learning: rules.AudioLearning = rules.AudioLearning()
    caching: H3Caching | None = None  # how latents are cached
    any_length: bool = False  # for generations: allow shorter and longer clips than in the model's training
    image_edge: int = IMAGE_EDGE  # short side of reference images
    video_edge: int = VIDEO_EDGE  # short side of reference videos
    options: Any = NO_OPTIONS  # set only in training

    abilities: ClassVar = Abilities(
        trains_audio=True,
        detects_few_steps=True,
        match_audio_schedule=True,
        takes_row_references=True,
        one_sample="MiniMax-H3 packs a clip with its text and audio in a sequence of its own",
        reads_empty_prompt=True,
        views=(FIRST_LAST, CLIP, SUBJECT),
    )
    few_steps: ClassVar = FEW_STEPS
    model_metadata: ClassVar = {
        "architecture": NAME,
        "implementation": "https://huggingface.co/MiniMaxAI/MiniMax-H3",
        "model_type": "minimax_h3",
    }
    name: str = field(default="minimax_h3", init=False)
    cache_tag: str = field(default="mmh3", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: rules.ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=frozenset({KEY, TAGS}), init=False)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata; full training also records the row order of fused weights."""
        if not isinstance(self.options, H3FullTrainingOptions):
            return self.add_file_names(self.model_metadata)
        frequencies = self.files.dit_header().config.frequencies
        return self.add_file_names(
            self.model_metadata | {LAYOUT_KEY: STACKED, FREQUENCIES_KEY: str(frequencies)}
        )

    def few_steps_evidence(self) -> str:
        """Return the reason why every run counts as distilled: guidance is built into the model."""
        return "it generates clips without a second pass for guidance"

    @property
    def latent(self) -> LatentSpec:
        """Return the video VAE's latent space, with the metadata that its caches must have."""
        latent = self.files.latent
        if self.caching is None:
            return latent
        return replace(latent, required_metadata=self.caching.declared, in_sections=self.caching.one_frame)

    @property
    def audio(self) -> AudioSpec:
        """Return the format of the audio latents."""
        return self.files.audio

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the values for sampling settings that a request leaves out."""
        height, width = SIZE
        return SamplingDefaults(
            steps=STEPS,
            fps=FPS,
            guidance_scale=1.0,  # none: the model has guidance built in
            embedded_guidance=None,
            flow_shift=self.noise.base_shift,
            solver=SOLVER,
            width=width,
            height=height,
            frames=FRAMES,
            extras=(AUDIO_SHIFT_KEY, *REFERENCE_MEDIA_KEYS),
        )

    # encoding

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table's media do not fit the task for which they are cached."""
        if self.caching is not None:
            self.caching.check_table(table)

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        """Return None, because clips are cached as a whole; raise MediaError if the length is invalid."""
        if self.caching is not None:
            self.caching.check_span(table, frames)
        return None

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Return what cached latents depend on: the VAEs and the caching options."""
        identity = dict(super().media_identity)
        return identity if self.caching is None else {**identity, **self.caching.identity}

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Load the video VAE, and for caching also the audio VAE."""
        encoders = super().media_encoders(device, images)
        if self.caching is None:
            return encoders
        return replace(encoders, audio=self.files.load_audio(device))

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return the batch's cache entries: latents of clip and audio, keyframes or references, metadata."""
        assert self.caching is not None
        return self.caching.encode(self.files, encoders, media)

    @property
    def audio_identity(self) -> Mapping[str, str]:
        """Return what cached audio depends on besides the samples."""
        return self.files.audio_identity()

    def audio_networks(self, device: torch.device, decodes: bool) -> H3AudioVae:
        """Load the audio VAE. It is loaded as a whole, so `decodes` has no effect."""
        return self.files.load_audio(device)

    def encode_audio(self, networks: H3AudioVae, samples: Tensor, frames: int, fps: float) -> Tensor:
        """Encode the audio of clips; `fps` is unused, because clips always have 24 frames per second."""
        return networks.encode_clip(samples, frames, FPS)

    def decode_audio(self, networks: H3AudioVae, latents: Tensor) -> Audio:
        """Decode audio latents to an audio track."""
        return networks.decode(latents)

    # the network

    def empty_text(self) -> Mapping[str, Tensor]:
        """Return the states and tags of the empty prompt in --h3_guidance_loss_uncond_cache, if given."""
        path = self.options.targets.h3_guidance_loss_uncond_cache
        if path is None:
            return {}
        states, tags = read_empty_prompt(path)
        width = self.files.dit_header().config.text_dim
        if states.shape[1] != width:
            raise CacheError(
                f"{path}: its states have width {states.shape[1]}, but {self.files.dit_path} requires "
                f"{width}. Make the file with {TEXTS_AGAIN} --uncond_output and Qwen3-VL (32B)."
            )
        return {KEY: states, TAGS: tags}

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return text states, token tags and media conditions; raise CacheError if they do not fit the model.

        With `batch.condition_set`, they are the conditions for a teacher's forward pass.
        """
        batch.check({KEY: TEXTS_AGAIN, TAGS: TEXTS_AGAIN}, "the transformer")
        config = self.files.dit_header().config
        remedy = f"{TEXTS_AGAIN} and Qwen3-VL (32B)"
        batch.check_widths({KEY: config.text_dim}, self.files.dit_path, remedy)
        check_texts(batch, self.files.task)
        if isinstance(self.options, H3TrainingOptions) and self.options.one_frame and latents.shape[2] > 1:
            raise OptionError(
                f"--one_frame: {batch.keys[0]} is a clip of {latents.shape[2]} latent frames. Omit the "
                "option, or pass tables with images only"
            )
        texts = {name: batch.tensors[name] for name in (KEY, TAGS)}
        if batch.condition_set:  # a teacher's pass, with separate text states
            texts = dict(zip((KEY, TAGS), teacher_rows(batch), strict=True))
            batch.check_widths(
                {teacher_key(batch.condition_set): config.text_dim}, self.files.dit_path, remedy
            )
        elif self.files.task == "t2va" and TARGET_INDEX not in batch.tensors:
            return texts  # plain text to video has no media conditions
        return {**texts, **media_conditions(batch, self.files.task, latents), **self._make_clean_fractions()}

    def _make_clean_fractions(self) -> Conditions:
        """Return how clean conditions are in training, as a condition of the network; {} outside training."""
        if not isinstance(self.options, H3TrainingOptions):
            return {}
        loss = self.options.loss
        return {CLEAN_FRACTIONS: torch.tensor([loss.h3_visual_cond_clean, loss.h3_audio_cond_clean])}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict noise minus latents, of frames and audio, flattened and joined to B N float32.

        Samples run one by one, because their texts and conditions differ in length. `timesteps` are B 2, of
        frames and of audio. The conditions are states of texts, n C each, and their token tags, n each.
        """
        joint = overrides.audio_video_shapes
        assert joint is not None, "there is always audio"
        images, audios = joint.split(noisy)
        if timesteps.ndim == 1:  # equal shifts: one level for both
            timesteps = timesteps.unsqueeze(1).expand(-1, 2)
        times = (1 - timesteps.double() / 1000).tolist()  # the network's time is 0 for noise, 1 for clean
        velocities = []
        for sample, (image_time, audio_time) in enumerate(times):
            batch_slice = slice(sample, sample + 1)
            is_image_token = (cond[TAGS][sample] == IMAGE_TAG).tolist()
            positioned = self._position_conditions(cond, sample, images)
            image, audio = dit(
                images[batch_slice],
                audios[batch_slice],
                (image_time, audio_time),
                send(cond[KEY][sample], noisy.device).unsqueeze(0),
                is_image_token=is_image_token if any(is_image_token) else (),
                start=positioned.start_time,
                conditions=positioned.conditions,
                overrides=overrides,
            )
            velocities.append(-joint.join(image, audio))  # the network predicts latents - noise
        return torch.cat(velocities)

    def _position_conditions(self, cond: Conditions, sample: int, images: Tensor) -> PositionedConditions:
        """Return a sample's keyframes and references with their positions, and the clip's start time."""
        positioned = position_conditions(cond, sample, len(cond[KEY][sample]), get_token_grid(images))
        fractions = read_clean_fractions(cond)
        conditions = []
        for condition in positioned.conditions:
            latents = send(condition.latents, images.device)
            fraction = fractions.audio if condition.is_audio else fractions.visual
            conditions.append(replace(condition, latents=latents, clean_fraction=fraction))
        return replace(positioned, conditions=tuple(conditions))

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Check and resolve a request: media, size, frames, noise levels, and what the text encoder sees.

        Raises OptionError for sizes, lengths and solvers that the model does not support.
        """
        request = _without_guidance(request)
        request = keep_usable_media(request, USABLE, f"{NAME} has separate options for frames and references")
        media = read_media(request)
        self._check_media(request, media)
        width, height, frames = self._resolve_size(request, media)
        self._check_frames(frames)
        if media.one_frame is not None and frames != 1:
            raise OptionError(
                f"--one_frame_inference generates a single image, but --video_length is {frames} (--f in a "
                "prompt line). Pass 1"
            )
        check_size((width, height, frames), self.latent)
        _check_sampling(request, frames)
        flow_shift = request.flow_shift or self.noise.base_shift
        prepared = resolve_request(
            request,
            self.defaults,
            size=(width, height, frames),
            flow_shift=flow_shift,
            default_negative=None,
        )
        _, channels, length, rows, columns = self.latent.shape(frames, height, width)
        sources = self._make_sources(media, (width, height), frames)
        if not media.references:
            warn_about_unused_edges(self.image_edge, self.video_edge, "there are no references")
        # The audio schedule's time shift; raise OptionError unless it is above 0
        shift = float(request.extra.get(AUDIO_SHIFT_KEY, self.noise.base_shift * self.noise.audio_shift))
        if not 0 < shift < float("inf"):
            raise OptionError(f"--h3_shift_audio {shift:g} (--fsa in a prompt line): use a number above 0")
        return replace(
            prepared,
            # the text encoder also sees the images
            prompts={0: _with_presentation(prepared, media, sources)},
            family_settings=H3Request(media, sources),
            extra_metadata=_describe_media(media),
            audio_video_shapes=AudioVideoShapes(
                (channels, length, rows, columns), self.audio.shape(frames, FPS)
            ),
            # the shift from the images' noise levels to the audio's
            audio_shift=shift / flow_shift,
        )

    def _check_frames(self, frames: int) -> None:
        """Raise OptionError if the model does not generate this number of frames."""
        if frames == 1:
            return
        lengths = self.latent.lengths
        if not lengths.includes(frames):
            lower = max(lengths.fit(frames), lengths.first)
            nearest = {lower, lower + lengths.step}
            if not self.any_length:  # suggest only lengths within the trained range
                nearest = {min(max(count, MIN_FRAMES), MAX_FRAMES) for count in nearest}
            remedy = " or ".join(map(str, sorted(nearest)))
            raise OptionError(
                f"--video_length {frames}: {NAME} generates {lengths} frames, or one. Pass {remedy}"
            )
        if not self.any_length and not MIN_FRAMES <= frames <= MAX_FRAMES:
            is_sample = isinstance(self.options, H3TrainingOptions)
            option = "h3_allow_experimental_sample_duration" if is_sample else "allow_experimental_duration"
            raise OptionError(
                f"--video_length {frames}: {NAME} was trained with {MIN_FRAMES} to {MAX_FRAMES} frames, 5 "
                f"to 15 seconds. Pass --{option} to allow other lengths"
            )

    def _check_media(self, request: Request, media: H3Media) -> None:
        """Raise OptionError if task or transformer do not fit the media, or a video is too long."""
        task = request.extra.get(TASK, media.task)
        if task != media.task:
            needed = {
                "t2va": "no keyframes and no references",
                "fl2va": "a first or a last frame (--first_frame, --last_frame)",
                "ref2va": "references (--ref)",
            }
            raise OptionError(
                f"--task {task} requires {needed[task]}, but the media of this request are for {media.task}. "
                f"Pass --task {media.task}, or omit it"
            )
        # each task has its own transformer
        replace(self.files, task=task).check(("dit",))
        for reference in media.references:
            if reference.kind == VIDEO:
                check_video_length(reference.path, self.any_length)

    def _resolve_size(self, request: Request, media: H3Media) -> tuple[int, int, int]:
        """Return width, height and frames; without a requested size, the first keyframe determines it."""
        width, height, frames = get_size(request, self.defaults)
        is_adaptive = request.width is None and request.height is None
        if is_adaptive and media.keyframes:
            image_width, image_height = image_size(media.keyframes[0])
            check_ratio(str(media.keyframes[0]), image_width, image_height)
            height, width = canvas(image_width / image_height, step=self.latent.pixel_step)
        return width, height, frames

    def _make_sources(self, media: H3Media, size: tuple[int, int], frames: int) -> H3Sources:
        """Return how to read the media, for a clip of this size (width, height) and number of frames."""
        step = self.latent.pixel_step
        references: list[ImageSource | ClipSource | None] = []
        for reference in media.references:
            if reference.kind == IMAGE:
                references.append(reference_image(reference.path, self.image_edge, step))
            elif reference.kind == VIDEO:
                references.append(reference_clip(reference.path, self.video_edge, step, frames))
            else:
                references.append(None)
        return H3Sources(tuple(keyframe_sources(media.keyframes, size)), tuple(references))

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether the request has keyframes or references."""
        return not prepared.family_settings.media.is_empty

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode keyframes and references to clean latents; for a single image, add the time positions.

        Raises MediaError if a file cannot be read, or a video is too short.
        """
        media = prepared.family_settings.media
        conditions = self._encode_references(encoders, prepared)
        # names of the keyframes' conditions
        keys = [key for key, path in ((FIRST, media.first), (LAST, media.last)) if path is not None]
        keys += [control_key(number) for number in range(len(media.controls))]
        # the same order as the keyframe sources: first, last, then control images
        for key, source in zip(keys, prepared.family_settings.sources.keyframes, strict=True):
            conditions[key] = encode_condition(encoders.vae, _make_clip(source.read().unsqueeze(0)))
        if media.one_frame is not None:
            conditions[TARGET_INDEX] = torch.tensor([media.one_frame.target_index or 0])
            indices = media.one_frame.control_indices or (0,) * len(media.controls)
            conditions[CONTROL_INDICES] = torch.tensor([indices], dtype=torch.int64)
        return {0: conditions} if conditions else {}

    def _encode_references(self, encoders: MediaEncoders, prepared: Prepared) -> dict[str, Tensor]:
        """Encode references as latents by condition name; the audio VAE is loaded only if one has audio."""
        record = prepared.family_settings
        references = record.media.references
        conditions = _encode_visual_references(encoders.vae, references, record.sources.references)
        audios = {}
        for index, reference in enumerate(references):
            path = reference.path if reference.kind == AUDIO else reference.audio
            if path is not None:
                audios[index] = path
        if audios:
            networks = self.files.load_audio(encoders.vae.device)
            for index, path in audios.items():
                waveform = read_reference_audio(path, prepared.frames / FPS)
                conditions[reference_key(index, AUDIO)] = networks.encode(waveform)
        return conditions

    @property
    def source(self) -> rules.SourceRules:
        """Return what denoising may start from: media, or latents of this model."""
        return rules.SourceRules(SOURCES, NAME, True, frozenset({self.name}))

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames as a normalized posterior sample drawn with `seed`."""
        return encode_target(encoders.vae, byte_clips(frames), seed)

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only denoising section: video and audio noise, joined to 1 N.

        The order of drawing decides the result for a seed: keyframes or references, frames, then audio
        tokens of the left channel and of the right one.
        """
        joint = prepared.audio_video_shapes
        assert joint is not None, "there is always audio"
        conditions = dict(inputs.get(0, {}))
        conditions |= add_noise_to_conditions(conditions, noise)
        image = noise.draw((1, *joint.image))
        channels, sides, length = joint.audio
        tokens = noise.draw((sides * length, channels))
        audio = tokens.mT.unflatten(1, (sides, length)).unsqueeze(0)
        return (yield prompts[0].section(joint.join(image, audio), conditions))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels in playing order, clip by clip."""
        yield from encoders.vae.decode(latents)


def _without_guidance(request: Request) -> Request:
    """Return a request without negative prompt, because the model has guidance built in."""
    check_guidance(request.guidance_scale, "--guidance_scale (in a prompt line --l)")
    if not request.negative_prompt:
        return request
    logger.warning(
        "--negative_prompt (--n) has no effect: the guidance of %s is built in, so no pass uses it",
        NAME,
    )
    return replace(request, negative_prompt=None)


def _check_sampling(request: Request, frames: int) -> None:
    """Raise OptionError for solvers other than Euler; warn about a different frame rate than the model's."""
    if request.solver not in (None, SOLVER):
        raise OptionError(
            "--sample_solver: images and audio of MiniMax-H3 have separate schedules, which only vanilla "
            "(Euler) supports. Omit it"
        )
    if request.fps not in (None, FPS) and frames > 1:
        logger.warning(
            "--fps %g: %s generates %g frames a second, and the audio keeps that speed",
            request.fps,
            NAME,
            FPS,
        )


def _encode_visual_references(
    vae: H3VideoVae, references: Sequence[H3Reference], sources: Sequence[Any]
) -> dict[str, Tensor]:
    """Encode reference images and clips as latents by condition name; the source of audio alone is None."""
    conditions = {}
    for index, (reference, source) in enumerate(zip(references, sources, strict=True)):
        if source is None:
            continue
        frames = source.read()
        frames = frames.unsqueeze(0) if reference.kind == IMAGE else cut_to_vae_length(frames)
        conditions[reference_key(index, reference.kind)] = encode_condition(vae, _make_clip(frames))
    return conditions


def _make_clip(frames: Tensor) -> Tensor:
    """Rearrange pixels, F H W 3 uint8, to the layout of the VAE's input, 1 3 F H W."""
    return byte_clips(frames.unsqueeze(0))


def _with_presentation(prepared: Prepared, media: H3Media, sources: H3Sources) -> Prompts:
    r"""Return a request's texts with the media that the encoder sees; each `\n` becomes a line break."""
    prompts = prepared.prompts[0]
    positive = prompts.positive
    seen = list(media.keyframes)
    seen += [reference.path for reference in media.references if reference.kind != AUDIO]
    positive = replace(
        positive,
        text=positive.text.replace("\\n", "\n"),
        images=tuple(seen),
        media_before_text=sources.presented_media(media.references),
    )
    return replace(prompts, positive=positive)


def _describe_media(media: H3Media) -> dict[str, str]:
    """Return metadata that lists the media from which a clip was made."""
    names = {"first_frame": media.first, "last_frame": media.last}
    metadata = {name: path.name for name, path in names.items() if path is not None}
    if media.controls:
        metadata["condition_image"] = ", ".join(path.name for path in media.controls)
    if media.references:
        metadata["references"] = ", ".join(reference.path.name for reference in media.references)
    return metadata


def family_for_latent_caching(options: H3LatentCachingOptions) -> MiniMaxH3:
    """Build the model description for minimax_h3_cache_latents.py."""
    caching = make_caching(options)
    return MiniMaxH3(H3Files(task=caching.task).add_vaes(options.vae), caching=caching)


def family_for_text_caching(options: H3TextCachingOptions) -> MiniMaxH3:
    """Build the model description for minimax_h3_cache_text_encoder_outputs.py."""
    return MiniMaxH3(make_text_caching_files(options), options=options)


def family_for_training(options: H3TrainingOptions) -> MiniMaxH3:
    """Build the model description for minimax_h3_train_network.py, with its noise and loss options."""
    loss = options.loss
    clean_fractions = CleanFractions(loss.h3_visual_cond_clean, loss.h3_audio_cond_clean)
    noise = replace(
        NOISE,
        base_shift=loss.h3_shift_video,
        audio_shift=loss.h3_shift_audio / loss.h3_shift_video,  # relative to the images' shift
        change_conditions=partial(add_noise_to_inputs, clean_fractions),
    )
    return MiniMaxH3(
        make_model_files(options, options.chosen_task),
        noise=noise,
        audio_learning=rules.AudioLearning(loss.h3_video_loss_weight, loss.audio_weight),
        any_length=options.h3_allow_experimental_sample_duration,
        options=options,
    )


def family_for_generation(options: H3GenerationOptions) -> MiniMaxH3:
    """Build the model description for minimax_h3_generate_video.py."""
    return MiniMaxH3(
        make_model_files(options, options.task or UNDECIDED),
        any_length=options.allow_experimental_duration,
        image_edge=options.media.reference_image_short_edge,
        video_edge=options.media.reference_video_short_edge,
    )


_: type[Family] = MiniMaxH3
_hears: type[HearsAudio] = MiniMaxH3
