"""Kandinsky 5 for clips and images, and Kandinsky 6 for clips with sound, described for the shared loops."""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders.files import OneTransformer, judge_distillation
from kandinsky.audio import AudioNetworks
from kandinsky.configs import IMAGE_SIZES, NAME, KandinskyTask
from kandinsky.files import AUDIO_SCALE, KandinskyFiles, select_task
from kandinsky.first_frame import match_first_frames, size_like_image
from kandinsky.names import KANDINSKY_6, LORA
from kandinsky.options import (
    KandinskyGenerationOptions,
    KandinskyLatentCachingOptions,
    KandinskyModelOptions,
    KandinskyTextCachingOptions,
    KandinskyTrainingOptions,
)
from kandinsky.spec import CLIP_LATENT, DIT, DIT_6, IMAGE_LATENT, IMAGE_RELEASE, NOISE, RELEASE, RELEASE_6
from kandinsky.text_encoders import POOLED_KEY, STATES_KEY, TEXT_KEYS, get_language_settings
from modules.errors import CacheError, DatasetError, OptionError
from modules.media.pixels import byte_clips, image_pixels
from modules.option_values import require
from modules.options import NO_OPTIONS
from protocols.data import (
    AUDIO_LATENTS,
    AUDIO_PART,
    CAPTION,
    FIRST_FRAME,
    HAS_AUDIO,
    IMAGE_LATENTS,
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
    name_text_and_mask,
    name_texts,
)
from protocols.family import Abilities, DitSpec, Family, HearsAudio, NoiseSource, NoiseSpec
from protocols.few_steps import FewSteps
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
from protocols.rules import AudioLearning, ModelRelease, SourceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

LATENTS_AGAIN = "kandinsky_cache_latents.py"
TEXTS_AGAIN = "kandinsky_cache_text_encoder_outputs.py"
CLIP_NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, "
    "deformed, walking backwards"
)
FEW_STEPS = 16  # of the releases distilled to few steps
FIRST_LATENTS = "first_latents"  # condition: clean latents of the first frame, B C 1 h w


@dataclass(frozen=True)
class Kandinsky(OneTransformer):
    """Description of Kandinsky 5 for one run, built by the `family_for_...` functions below."""

    files: KandinskyFiles
    first_frame_probability: float = 0.0  # fraction of training batches of clips with a given first frame
    options: Any = NO_OPTIONS  # set only in training

    name: str = field(default="kandinsky", init=False)
    cache_tag: str = field(default="k5", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)
    few_steps: ClassVar = FewSteps(
        base="the sft or pretrain release of the same size",
        distillation_clause="was distilled to run without guidance, and perhaps in few steps",
        unlearned_pronoun="this",
        distilled_words="nocfg|16_?steps",
    )

    @property
    def task(self) -> KandinskyTask:
        """The use of the model."""
        return self.files.task

    @property
    def latent(self) -> LatentSpec:
        """Latent space of the task: HunyuanVideo's, or for images FLUX.1's without its shift."""
        return IMAGE_LATENT if self.task.makes_images else CLIP_LATENT

    @property
    def noise(self) -> NoiseSpec:
        """How training adds noise, and how often the first frame of clips is given."""
        return replace(NOISE, first_frame_probability=self.first_frame_probability)

    @property
    def teacher_only_conditions(self) -> tuple[str, ...]:
        """Return the conditions that only a teacher gets: the caption, and for clips the first frame."""
        return (CAPTION,) if self.task.makes_images else (CAPTION, FIRST_FRAME)

    @property
    def defaults(self) -> SamplingDefaults:
        """Steps, guidance, flow shift and size of the task; releases without guidance have scale 1."""
        task = self.task
        steps, guidance = task.steps, task.guidance
        if self.files.dit is not None:
            verdict = judge_distillation(self.few_steps, self.files.dit)
            if verdict is not None and verdict.is_distilled:
                guidance = 1.0
                steps = steps if "nocfg" in verdict.evidence.lower() else FEW_STEPS
        return SamplingDefaults(
            steps=steps,
            fps=24.0,
            guidance_scale=guidance,
            embedded_guidance=None,
            flow_shift=task.flow_shift,
            solver="euler",
            width=task.width,
            height=task.height,
            frames=task.frames,
            sized_by_images=task.requires_image,
        )

    @property
    def release(self) -> ModelRelease:
        """Repositories and license of the released model."""
        return IMAGE_RELEASE if self.task.makes_images else RELEASE

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the model: its task and the names of its files."""
        names = {
            "architecture": "Kandinsky-5",
            "implementation": "https://github.com/kandinskylab/kandinsky-5",
            "model_type": "kandinsky5",
            "task": self.task.name,
        }
        return self.add_file_names(names)

    # encoding

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has control media, or clips for a task that makes images."""
        table.reject_control(NAME)
        if self.task.makes_images and table.kind != "image":
            raise DatasetError(
                f"{table.name}: the table has clips, and --task {self.task.name} can only learn images. Set "
                "image_directory or image_jsonl_file, or use a task for clips such as k5-lite-t2v-5s-sd."
            )

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode clips as means of the VAE's posterior; those of clips are not scaled to model space."""
        entries: list[list[CacheEntry]] = []
        vae = encoders.vae
        for part in media.split_for(vae.device):
            latents = vae.encode(byte_clips(part.frames)).to(vae.dtype)
            entries += [[CacheEntry({"latents": latent.clone()})] for latent in latents]
        return entries

    # the network

    def check_named_files(self) -> None:
        """Check all files that options name, and that the transformer fits --task."""
        if self.files.dit is not None:
            self.files.check_task()
        self.files.check()

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions of a training batch: text states and the pooled state of CLIP.

        Raises CacheError if they are missing, have another width, or were encoded with another template.
        """
        batch.check(dict.fromkeys(sorted(TEXT_KEYS), TEXTS_AGAIN), "the transformer")
        config = self.files.dit_header().config
        widths = {STATES_KEY: config.text_dim, POOLED_KEY: config.pooled_dim}
        batch.check_widths(widths, self.files.dit_path, f"{TEXTS_AGAIN} and the text encoders of {NAME}")
        path = get_language_settings(self.task).find_other_template(batch)
        if path is not None:  # that of clips differs from that of images
            raise CacheError(
                f"{path}: its caption was encoded with a template for another task than {self.task.name}. "
                f"Cache again with {TEXTS_AGAIN} --task {self.task.name}."
            )
        return {name: batch.tensors[name] for name in TEXT_KEYS}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C F H W float32.

        The conditions are text_embeds (T D for each sample: states of the language model) and pooled_embed
        (B E: pooled state of CLIP).
        """
        pooled = name_texts(cond, {"pooled": POOLED_KEY}, noisy.device)
        # text states and mask, by the names of the network's arguments
        name_inputs = partial(name_text_and_mask, argument="text", name=STATES_KEY, device=noisy.device)
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_inputs(cond),
            **pooled,
            position_scale=self.task.position_scale,
            overrides=overrides.rename_nag(name_inputs),
        )
        return velocity

    # generation

    def check_files(self, media: bool) -> None:
        """Check the transformer, its task, and text encoders, and with `media` the VAE."""
        self.files.check_task()
        super().check_files(media)

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request's size, frames and guidance; a clip gets the aspect ratio of its first image."""
        task = self.task
        self.files.check_task()
        self.files.check()
        usable = {**NO_MEDIA, "image_path": task.requires_image or task.takes_clean_first_frame}
        request = keep_usable_media(request, usable, f"--task {task.name} does not take it")
        width, height, frames = get_size(request, self.defaults)
        if task.requires_image:
            require(request.first_image, "--image_path", f"--task {task.name} starts from an image")
        image = self._get_image(request)
        if image is not None and request.width is None and request.height is None:
            width, height = size_like_image(image, task.area)
        if task.makes_images and frames != 1:
            raise OptionError(f"--video_length {frames}: --task {task.name} makes one image. Omit it")
        if task.makes_images and (width, height) not in IMAGE_SIZES:
            logger.warning(
                "the size %d x %d is not one of those that the model was trained with: %s",
                width,
                height,
                ", ".join(f"{side} x {other}" for side, other in IMAGE_SIZES),
            )
        size = width, height, full_frames(frames, self.latent)
        if image is not None and size[2] == 1:
            raise OptionError(
                f"--image_path {image}: it becomes the first frame, and the video has only "
                "one. Pass a --video_length of 5 or more"
            )
        check_size(size, self.latent)
        flow_shift = task.flow_shift if request.flow_shift is None else request.flow_shift
        negative = "" if task.makes_images else CLIP_NEGATIVE
        return resolve_request(request, self.defaults, size, flow_shift, default_negative=negative)

    def _get_image(self, request: Request) -> Path | None:
        """Return the image that a clip begins with; None if it begins freely."""
        return request.first_image if self.task.requires_image else None

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether the clip begins with an image."""
        return self._get_image(prepared.request) is not None

    @property
    def source(self) -> SourceRules:
        """Rules for starting from a video, an image, or latents of this model."""
        supported = (IMAGE, LATENTS) if self.task.makes_images else (VIDEO, IMAGE, LATENTS)
        return SourceRules(supported, f"--task {self.task.name}", False, frozenset({self.name}))

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames as the mean of the posterior, in model space; `seed` is unused."""
        latents: Tensor = encoders.vae.encode(byte_clips(frames))
        return self.latent.to_model(latents)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the image of a request as clean latents of the first frame, on the CPU, in model space."""
        image = prepared.request.first_image
        if not self.task.requires_image or image is None:
            return {0: {}}
        pixels = image_pixels(image, prepared.width, prepared.height, keep_aspect=False)
        return {0: {FIRST_LATENTS: self.latent.to_model(encoders.vae.encode(pixels)).cpu()}}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section to the denoising loop, and return its latents.

        Noise is drawn with the channels last, as the released code does, so that seeds give the same clips. A
        given first frame is a clean frame of the section.
        """
        conditions = dict(inputs.get(0, {}))
        first_latents = conditions.pop(FIRST_LATENTS, None)
        section = prompts[0].section(self._draw_clip(prepared, noise), conditions)
        if not isinstance(first_latents, Tensor):
            return (yield section)
        overrides = Overrides(num_clean_frames=1)
        latents = yield replace(section, clean_frames=first_latents, overrides=overrides)
        return match_first_frames(latents)

    def _draw_clip(self, prepared: Prepared, noise: NoiseSource) -> Tensor:
        """Draw the noise of a clip or image with its channels last; return it as B C F H W float32."""
        _, channels, frames, rows, columns = self.latent.shape(
            prepared.frames, prepared.height, prepared.width
        )
        drawn = noise.draw((1, frames, rows, columns, channels), self.files.compute_dtype() or torch.float32)
        return drawn.permute(0, 4, 1, 2, 3).float().contiguous()

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels: one image, or one frame and then four at a time."""
        latents = (latents - self.latent.shift) / self.latent.scale
        decoded = encoders.vae.decode(latents)
        yield from (decoded,) if self.task.makes_images else decoded


@dataclass(frozen=True)
class Kandinsky6(Kandinsky):
    """Description of Kandinsky 6 for one run: clips with sound, or silent ones."""

    has_audio: bool = True  # whether clips are cached, trained or made with their sound
    audio_learning: AudioLearning = AudioLearning()

    name: str = field(default=KANDINSKY_6.name, init=False)
    cache_tag: str = field(default="k6", init=False)
    dit: DitSpec = field(default=DIT_6, init=False)
    abilities: ClassVar = Abilities(trains_audio=True, detects_few_steps=True, match_audio_schedule=True)
    few_steps: ClassVar = FewSteps(base="the sft or pretrain release of the same size")

    @property
    def noise(self) -> NoiseSpec:
        """How training adds noise, and how often the first frame of clips is given as an image."""
        return replace(NOISE, change_conditions=partial(drop_image, self.first_frame_probability))

    @property
    def teacher_only_conditions(self) -> tuple[str, ...]:
        """Return the conditions that only a teacher gets: the caption."""
        return (CAPTION,)

    @property
    def release(self) -> ModelRelease:
        """Repositories and license of the released models."""
        return RELEASE_6

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the model: its task, the names of its files, and the scale of the sound's latents."""
        names = {
            "architecture": "Kandinsky-6",
            "implementation": "https://github.com/kandinskylab/kandinsky-6",
            "model_type": "kandinsky6",
            "task": self.task.name,
        }
        if self.files.audio_vae is not None:
            scale = self.files.audio_scale
            names[f"ss_{AUDIO_SCALE}"] = scale
            names["trained_for"] = f"latents of sound scaled by {scale}"
        return self.add_file_names(names)

    # sound

    @property
    def audio(self) -> AudioSpec | None:
        """Format of the sound's latents; None if this run has no sound."""
        return self.files.audio if self.has_audio else None

    @property
    def audio_identity(self) -> Mapping[str, str]:
        """Return what cached sound depends on besides the samples: weights and scale of its VAE."""
        return self.files.audio_identity()

    def audio_networks(self, device: torch.device, decodes: bool) -> AudioNetworks:
        """Load the sound's VAE, and for decoding also the vocoder."""
        return self.files.load_audio(device, decodes)

    def encode_audio(self, networks: AudioNetworks, samples: Tensor, frames: int, fps: float) -> Tensor:
        """Encode the sound of clips, cut or padded with silence to their length, as B C L 1."""
        return networks[0].encode_clip(samples, frames, fps)

    def decode_audio(self, networks: AudioNetworks, latents: Tensor) -> Audio:
        """Decode latents of sound, 1 C L 1, to a track: first to a mel spectrogram, then to samples."""
        vae, vocoder = networks
        assert vocoder is not None, "loaded to encode"
        return vocoder.decode(vae.decode(latents))

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode clips, and the first frame of each on its own, which may be given as an image."""
        entries = super().encode_media(encoders, media)
        if media.frames.shape[1] == 1:
            return entries
        first = super().encode_media(encoders, replace(media, frames=media.frames[:, :1]))
        joined = []
        for (clip,), (image,) in zip(entries, first, strict=True):
            joined.append([CacheEntry({**clip.tensors, IMAGE_LATENTS: image.tensors["latents"]})])
        return joined

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions of a training batch: texts, which samples have sound, a given image.

        Raises CacheError if texts are missing or do not fit, or if sound was cached with another scale.
        """
        conditions = dict(super().batch_conditions(latents, batch))
        if AUDIO_LATENTS in batch.tensors:
            conditions[HAS_AUDIO] = batch.tensors[HAS_AUDIO]
            self._check_audio_scale(batch)
        image = batch.tensors.get(IMAGE_LATENTS)
        if isinstance(image, Tensor):
            conditions[FIRST_LATENTS] = self.latent.to_model(image)
        return conditions

    def _check_audio_scale(self, batch: Batch) -> None:
        """Raise CacheError if the sound of a batch was cached with another scale than that of --audio_vae."""
        if self.files.audio_vae is None:
            return
        scale = self.files.audio_scale
        for cache in batch.cache_origins:
            cached = cache.encoder.get(AUDIO_SCALE, scale)
            if cache.part == AUDIO_PART and cached != scale:
                raise CacheError(
                    f"{cache.path}: the latents of its sound are scaled by {cached}, but those of "
                    f"--audio_vae by {scale}: releases differ. Cache again with {LATENTS_AGAIN} and the "
                    "audio_vae of the release that is trained."
                )

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity in float32: B C F H W, or B N of a clip and its sound.

        The conditions are text_embeds, pooled_embed, and for some clips `FIRST_LATENTS` and `HAS_AUDIO`.
        """
        joint = overrides.audio_video_shapes
        video, audio = (noisy, None) if joint is None else joint.split(noisy)
        if timesteps.ndim == 2:  # a column for each stream, whose times are the same
            timesteps = timesteps[:, 0]
        name_inputs = partial(name_text_and_mask, argument="text", name=STATES_KEY, device=noisy.device)
        image, has_audio = (cond.get(name) for name in (FIRST_LATENTS, HAS_AUDIO))
        velocities = dit(
            video,
            timesteps.float(),
            **name_inputs(cond),
            **name_texts(cond, {"pooled": POOLED_KEY}, noisy.device),
            position_scale=self.task.position_scale,
            audio=audio,
            has_audio=has_audio if isinstance(has_audio, Tensor) else None,
            image=image.to(noisy.device) if isinstance(image, Tensor) else None,
            overrides=overrides.rename_nag(name_inputs),
        )
        velocity: Tensor = velocities.video
        return velocity if joint is None else joint.join(velocity, velocities.audio)

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request's size, frames and guidance, and whether the clip has sound."""
        prepared = super().prepare(request)
        takes_image = self.files.dit_header().config.num_token_types > 0
        if self._get_image(prepared.request) is not None and not takes_image:
            raise OptionError(
                f"--image_path: {self.files.dit_path} has no types of tokens, so it makes clips from text "
                "alone. Omit the image, or pass another file to --dit"
            )
        if self.files.vocoder is None or prepared.frames == 1:
            if prepared.frames > 1:
                logger.info("The clip has no sound, which needs --audio_vae and --vocoder")
            return prepared
        _, channels, frames, rows, columns = self.latent.shape(
            prepared.frames, prepared.height, prepared.width
        )
        audio = self.files.audio.shape(prepared.frames, prepared.fps)
        shapes = AudioVideoShapes((channels, frames, rows, columns), audio)
        return replace(prepared, audio_video_shapes=shapes)

    def _get_image(self, request: Request) -> Path | None:
        """Return the image that a clip begins with; None if it begins freely."""
        return request.image_path

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the image of a request as clean latents, on the CPU, in model space."""
        image = prepared.request.image_path
        if image is None:
            return {0: {}}
        pixels = image_pixels(image, prepared.width, prepared.height)
        return {0: {FIRST_LATENTS: self.latent.to_model(encoders.vae.encode(pixels)).cpu()}}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section to the denoising loop, and return its latents.

        Noise is drawn with the channels last, for the video and then for the sound, as the released code
        does. A given image is an input of the network.
        """
        video = self._draw_clip(prepared, noise)
        joint = prepared.audio_video_shapes
        if joint is None:
            return (yield prompts[0].section(video, inputs.get(0)))
        audio_channels, length, _ = joint.audio
        dtype = self.files.compute_dtype() or torch.float32
        audio = noise.draw((1, length, audio_channels), dtype).transpose(1, 2).unsqueeze(3).float()
        return (yield prompts[0].section(joint.join(video, audio), inputs.get(0)))


def drop_image(
    probability: float, tensors: Conditions, condition_set: str, generator: torch.Generator
) -> Conditions:
    """Keep the first frame of a training batch, as an image that is given, with a probability."""
    if IMAGE_LATENTS not in tensors or torch.rand((), generator=generator).item() < probability:
        return tensors
    return {name: value for name, value in tensors.items() if name != IMAGE_LATENTS}


def family_for_latent_caching(options: KandinskyLatentCachingOptions) -> Kandinsky:
    """Build the model description for kandinsky_cache_latents.py, which needs only the VAEs."""
    task = select_task(options.task, None, options.vae.file.vae, options.vae.audio_vae)
    files = KandinskyFiles(task=task).add_vae_options(options.vae)
    if not task.has_audio:
        files.check_audio()  # none may be given
        return Kandinsky(files)
    if files.audio_vae is None:
        logger.info("There is no --audio_vae: only the video of clips is cached")
    return Kandinsky6(files, has_audio=files.audio_vae is not None)


def family_for_text_caching(options: KandinskyTextCachingOptions) -> Kandinsky:
    """Build the model description for kandinsky_cache_text_encoder_outputs.py: only text encoders."""
    files = KandinskyFiles(task=select_task(options.task, None)).add_text(options.text)
    return Kandinsky6(files) if files.task.has_audio else Kandinsky(files)


def family_for_training(options: KandinskyTrainingOptions) -> Kandinsky:
    """Build the model description for kandinsky_train_network.py and kandinsky_train.py."""
    files = _make_files(options)
    probability = options.first_frame_probability
    if probability is None:
        # filled in here, because the value is recorded and compared later
        probability = float(files.task.requires_image)
    options = replace(options, task=files.task.name, first_frame_probability=probability)
    if files.task.has_audio:
        learning = AudioLearning(audio_weight=options.audio_loss_weight)
        return Kandinsky6(files, probability, options, audio_learning=learning)
    if options.audio_loss_weight != 1:
        raise OptionError(
            f"--audio_loss_weight {options.audio_loss_weight:g}: --task {files.task.name} makes no sound. "
            "Omit the option"
        )
    return Kandinsky(files, 0.0 if files.task.makes_images else probability, options)


def family_for_generation(options: KandinskyGenerationOptions) -> Kandinsky:
    """Build the model description for kandinsky_generate_video.py."""
    files = _make_files(options)
    return (
        Kandinsky6(files, has_audio=files.vocoder is not None) if files.task.has_audio else Kandinsky(files)
    )


def _make_files(options: KandinskyModelOptions) -> KandinskyFiles:
    task = select_task(options.task, options.dit)
    files = KandinskyFiles(task=task).add_dit(options.dit, options.dit_dtype)
    return files.add_vae_options(options.vae).add_text(options.text)


_: type[Family] = Kandinsky
_hears: type[HearsAudio] = Kandinsky6
