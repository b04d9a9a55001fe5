"""LTX-2, 2.3 and 2.5, described for the shared loops: video with or without audio, or audio alone."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ltx_2.audio_reference_options import (
    AUTO,
    IDENTITY_SCALE,
    NEGATIVE_POSITIONS,
    STRATEGIES,
    ReferenceStrategy,
)
from ltx_2.audio_references import (
    FALSE,
    REFERENCE_AUDIO_OPTION,
    TRUE,
    AudioReferenceRules,
    RequestReferences,
    check_batch,
    find_audio_reference,
    make_audio_rules,
    warn_about_unused_options,
)
from ltx_2.blocks import LtxReferences
from ltx_2.configs import AUDIO as AUDIO_MODALITY
from ltx_2.configs import DIT, LORA_PRESETS, NEGATIVE_PROMPT, NOISE, RELEASES
from ltx_2.configs import VIDEO as VIDEO_MODALITY
from ltx_2.files import Ltx2Files, check_version, make_model_files, shifted_logit
from ltx_2.given import insert_guides, make_clean_latent_rules, select_clean_latents_by_mask
from ltx_2.given_media import (
    check_media,
    encode_given_audio,
    encode_images,
    fix_clean_latents,
    pop_clean_latents,
    with_request_values,
)
from ltx_2.given_media_options import Ltx2GivenMedia
from ltx_2.guidance import guidance_rules
from ltx_2.keyframes import (
    add_generated_keyframes,
    append_keyframes,
    append_training_keyframes,
    cut_appended_frames,
    encode_keyframes,
    pop_keyframes,
)
from ltx_2.media import Ltx2Media
from ltx_2.model_options import AUDIO, VIDEO, Ltx2GuidanceOptions
from ltx_2.names import LORA
from ltx_2.options import (
    NAME,
    Ltx2GenerationOptions,
    Ltx2LatentCachingOptions,
    Ltx2TextCachingOptions,
    Ltx2TrainingOptions,
    apply_conditioning_config,
    log_ignored,
)
from ltx_2.reference_options import MAX_REFERENCES
from ltx_2.references import (
    REFERENCE_STRENGTHS,
    NoisyReferences,
    check_references,
    check_sides,
    factor_metadata,
    get_reference_latents,
    make_rules,
    read_pixels,
    read_strengths,
    reference_key,
    select_reference_frames,
    split_audio,
    split_noisy_references,
    with_noisy_references,
)
from ltx_2.stages import TwoStages, stage_sections, two_stages
from ltx_2.text_encoder import MASK, prompt_key
from ltx_2.upscaler import TEMPORAL, enlarge
from modules.errors import DatasetError, OptionError
from modules.media.pixels import image_pixels, to_pixels, video_pixels
from modules.media.reading import is_single_image
from modules.media.samples import read_reference
from modules.option_values import to_path
from modules.options import NO_OPTIONS, get_option_info, replace_synonyms
from protocols import rules
from protocols.data import (
    FIRST_FRAME,
    FPS,
    HAS_AUDIO,
    REFERENCE_AUDIO,
    REFERENCE_LATENTS,
    AudioSpec,
    AudioVideoShapes,
    Batch,
    CacheEntry,
    Conditions,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
    name_texts,
    split_items,
)
from protocols.family import Abilities, DitSpec, Family, HearsAudio, NoiseSource, NoiseSpec
from protocols.few_steps import GUIDED, FewSteps, make_transfer_target
from protocols.loading import Placement
from protocols.requests import (
    NO_MEDIA,
    Prepared,
    Request,
    check_frames,
    check_opens,
    check_size,
    full_frames,
    get_size,
    keep_usable_media,
    resolve_request,
)
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

# keys of `Request.extra` that this family reads
LINE_EXTRAS = (
    "reference_video",
    "keyframe",
    "latent_frame",
    *("inpaint_mask", "inpaint_invert", "inpaint_threshold"),
    REFERENCE_AUDIO_OPTION,
)
FIRST_LATENTS = "first_latents"  # key of a condition: clean latents of the given first frames, B C F H W
SOLVER = "euler-tenth"
# --ltx2_train_direction -> the stream that stays clean as a condition; "" for none
CLEAN_STREAMS = {"joint": "", "a2v": rules.AUDIO_STREAM, "v2a": rules.IMAGE_STREAM}


@dataclass(frozen=True)
class Ltx2(Ltx2Media):
    """Description of LTX-2 for one run, built by the `family_for_...` functions below."""

    files: Ltx2Files
    guidance: Ltx2GuidanceOptions = Ltx2GuidanceOptions.from_defaults()
    noise: NoiseSpec = NOISE
    dit: DitSpec = DIT
    audio_learning: rules.AudioLearning = rules.AudioLearning()
    size: tuple[int, int, int] = (768, 512, 121)  # default width, height and number of frames
    image_crf: int | None = None  # H.264 quality to which the first image is compressed; None: the release's
    input_media: Ltx2GivenMedia = Ltx2GivenMedia.from_defaults()  # for generations: kept parts of other media
    drive_video: Path | None = None  # for generations: a video that stays unchanged and gets new audio
    makes_audio: bool = True  # False: samples of a training run with audio are generated without it
    stages: TwoStages | None = None
    options: Any = NO_OPTIONS  # set only in training
    references: rules.ReferenceRules | None = rules.ReferenceRules(MAX_REFERENCES, clips=True)
    reference_strength: float = 1.0  # for generations; below 1, references are denoised too
    reference_attention: tuple[Path | None, float] = (None, 1.0)  # mask and strength
    strategy: ReferenceStrategy = STRATEGIES[AUTO]
    audio_references: AudioReferenceRules = AudioReferenceRules()
    reference_dropout_rate: float = 0.0  # fraction of training batches without their references

    abilities: ClassVar = Abilities(
        trains_audio=True, takes_fps=True, detects_few_steps=True, trains_with_guides=True
    )
    name: str = field(default="ltx2_v1", init=False)
    few_steps: ClassVar = FewSteps(
        base="the transformer called dev",
        also="the distilled one",
        targets=(GUIDED, make_transfer_target("dev", "ltx-dev.safetensors")),
    )
    cache_tag: str = field(default="ltx2", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)

    @property
    def vae_dtype(self) -> torch.dtype:
        """Return the VAE's compute dtype, in which latents are cached."""
        return self.files.encoder_dtype(self.files.vae_dtype)

    @property
    def audio(self) -> AudioSpec | None:
        """Return the format of the audio latents; None if the run has no audio."""
        audio = super().audio
        if audio is None:
            return None
        return replace(
            audio,
            takes_references=self.strategy.takes_audio,
            reference_dropout_rate=self.reference_dropout_rate,
        )

    @property
    def version(self) -> str:
        """Return the release of the transformer's file; "2.3" without a transformer."""
        return "2.3" if self.files.dit is None else self.files.dit_header().config.kind

    @property
    def teacher_only_conditions(self) -> tuple[str, ...]:
        """Return the conditions that only the teacher gets in distillation, not the student."""
        return (*super().teacher_only_conditions, FIRST_FRAME)

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the defaults for generation; the flow shift is that of 4096 tokens at any size, as released.

        In training, `self.size` is the size of samples.
        """
        width, height, frames = self.size
        return SamplingDefaults(
            steps=RELEASES[self.version].steps,
            fps=24.0,
            guidance_scale=3.0,
            embedded_guidance=None,
            flow_shift=rules.ShiftedLogit().shift(4096),
            solver=SOLVER,
            width=width,
            height=height,
            frames=frames,
            extras=LINE_EXTRAS,
        )

    @property
    def release(self) -> rules.ModelRelease:
        """Repositories and license of the version."""
        return RELEASES[self.version].release

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return metadata for saved files: version, trained streams, and how a LoRA uses references."""
        names = {
            "architecture": f"ltx-{self.version}",
            "implementation": "https://github.com/Lightricks/LTX-2",
            "model_type": self.name,
        }
        if isinstance(self.options, Ltx2TrainingOptions):
            names |= replace_synonyms(
                get_option_info(Ltx2TrainingOptions), {"ltx_mode": self.options.model.ltx_mode}
            )
        if self.references is not None and self._records_factors(self.references):
            names |= factor_metadata(self.references)
        ends_before_audio = self.audio_references.ends_before_audio
        if AUDIO in self.strategy.needs or (self.strategy.takes_audio and ends_before_audio):
            names[NEGATIVE_POSITIONS] = TRUE if ends_before_audio else FALSE
        return self.add_file_names(names)

    def _records_factors(self, references: rules.ReferenceRules) -> bool:
        """Return whether LoRAs record reference factors: factors of 1 only if the run uses references."""
        strategy = getattr(self.options, "ic_lora_strategy", None)
        preset = getattr(self.options, "lora_target_preset", None)
        uses_references = "v2v" in (strategy, preset) or VIDEO in self.strategy.needs
        is_scaled = (references.size_factor, references.time_factor) != (1, 1)
        return uses_references or is_scaled

    # encoding

    @property
    def text_keys(self) -> frozenset[str]:
        """Return the cache keys of the used streams' text states, and of their mask."""
        return frozenset({*map(prompt_key, self.files.streams), MASK})

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has control media: references of LTX-2 have separate keys."""
        if table.has_control:
            raise DatasetError(
                f"{table.name}: LTX-2 has no control clips. The source of a clip is a reference: "
                "name its folder reference_directory, not control_directory, and in lists reference_path."
            )
        if table.guides and not self.files.has_images:
            raise DatasetError(
                f"{table.name}: --ltx2_mode audio has no images, so guides have no effect. Omit them"
            )

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode clips and their references; without video, return empty latents of the clip's shape."""
        if not self.files.has_images:
            shape = self.latent.shape(*media.frames.shape[1:4])[1:]
            return [[CacheEntry({"latents": torch.zeros(shape, dtype=self.vae_dtype)})] for _ in media.keys]
        entries = []
        for part in media.split_for(encoders.vae.device):
            latents = self._encode_clips(encoders.vae, part)
            entries += [[entry] for entry in split_items(latents)]
        return entries

    def _encode_clips(self, vae: Any, media: MediaBatch) -> dict[str, Tensor]:
        """Encode clips, references and guide images; return latents, B C F H W each, by cache key."""
        frames = {"latents": media.frames}
        guide_keys = media.table.guides
        num_references = len(media.references) - len(guide_keys)  # the guides come last
        for index, reference in enumerate(media.references[:num_references]):
            assert self.references is not None
            frames[reference_key(index)] = select_reference_frames(
                reference, self.references, self.latent.frame_step
            )
        frames |= dict(zip(guide_keys, media.references[num_references:], strict=True))
        latents = {}
        for name, clips in frames.items():
            latents[name] = vae.encode(to_pixels(clips.to(vae.device))).to(self.vae_dtype)
        return latents

    # the network

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer, and attach the paths of LoRAs that only one stage uses."""
        network = self.files.load_dit(placement)
        network.spec = self.dit
        if self.stages is not None and self.stages.loras:
            network.stage_files = [(lora.path, lora.option) for lora in self.stages.loras]
        return network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions of a training batch: texts, frame rates, and which samples have audio."""
        if isinstance(self.options, Ltx2TrainingOptions):
            check_batch(batch, self.strategy, self.options.strategy_option)
        names = [*self.files.check_cached_texts(batch), FPS, HAS_AUDIO, REFERENCE_AUDIO]
        names += [name for name in batch.tensors if name.startswith(REFERENCE_LATENTS)]
        return {name: batch.tensors[name] for name in names if name in batch.tensors}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity in float32, B C F H W; with audio B N of video and audio joined.

        1. Split the joint latents into streams; append the keyframes of a training batch.
        2. Call the network with references, clean or denoised along with the video.
        3. Cut the keyframes off, and join the velocities of the streams.

        The conditions are video_prompt_embeds and audio_prompt_embeds B T C, FPS and HAS_AUDIO.
        """
        joint = overrides.audio_video_shapes
        image, audio = split_audio(noisy, joint)
        # two axes: a column for each stream
        image_timesteps, audio_timesteps = timesteps.unbind(1) if timesteps.ndim == 2 else (timesteps,) * 2
        num_frames = image.shape[2]
        image, overrides = self._append_training_keyframes(image, image_timesteps, overrides)
        references = [
            self.latent.to_model(latents.to(noisy.device)) for latents in get_reference_latents(cond)
        ]
        noisy_references = None
        if references and self.reference_strength != 1:
            image, noisy_references = split_noisy_references(image, references, self.reference_strength)
        rename_texts = partial(_name_texts, device=noisy.device)
        velocity, audio_velocity = dit(
            image if self.files.has_images else None,
            image_timesteps,
            fps=self._list_rates(cond),
            audio=audio,
            audio_timesteps=audio_timesteps,
            has_audio=None if audio is None else _find_tensor(cond, HAS_AUDIO),
            overrides=overrides.rename_nag(rename_texts),
            references={
                VIDEO_MODALITY: self._make_network_references(
                    references, noisy_references, _find_tensor(cond, REFERENCE_STRENGTHS), noisy.device
                ),
                AUDIO_MODALITY: self.audio_references.select(cond, overrides),
            },
            keyframes=overrides.clean_tokens.keyframe_indices if overrides.clean_tokens else (),
            **rename_texts(cond),
        )
        if not self.files.has_images:  # joint latents have a velocity for both streams
            velocity = torch.zeros_like(image)
        if noisy_references is not None:
            velocity = noisy_references.pack_velocity(velocity, image, sigma=image_timesteps / 1000)
        velocity = velocity[:, :, :num_frames]  # without the keyframes of a training batch
        return velocity if joint is None else joint.join(velocity, audio_velocity)

    def _append_training_keyframes(
        self, image: Tensor, timesteps: Tensor, overrides: Overrides
    ) -> tuple[Tensor, Overrides]:
        """Append a training batch's keyframes, if any, to its noisy video and to the clean latents."""
        # In a generation, keyframes already are part of the noisy video.
        clean_tokens = overrides.clean_tokens
        if clean_tokens is None or clean_tokens.keyframes is None:
            return image, overrides
        keyframes = self.latent.to_model(clean_tokens.keyframes.to(image.device, image.dtype))
        image, extended_tokens = append_training_keyframes(
            image, clean_tokens, keyframes, sigmas=timesteps / 1000
        )
        return image, replace(overrides, clean_tokens=extended_tokens)

    def _list_rates(self, cond: Conditions) -> float | list[float]:
        """Return the frames per second of each sample; the default if the conditions lack them."""
        rates = _find_tensor(cond, FPS)
        if rates is None:
            return self.defaults.fps
        return [rate / 1000 for rate in rates.tolist()]

    def _make_network_references(
        self,
        references: Sequence[Tensor],
        noisy_references: NoisyReferences | None,
        strengths: Tensor | None,
        device: torch.device,
    ) -> LtxReferences:
        """Return the video's references with noise, strengths and time factor, as an input of the network."""
        return LtxReferences(
            references if noisy_references is None else noisy_references.unflatten_like(references),
            frame_stride=1 if self.references is None else self.references.time_factor,
            timestep_fraction=0.0 if noisy_references is None else 1 - noisy_references.strength,
            attention_strengths=None if strengths is None else strengths[0].to(device),
        )

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Check and resolve a request: size, guidance, references, audio and stages.

        1. Read the given media and references, with the values of the prompt line.
        2. Fill in the defaults, and divide the request into stages if asked.
        3. Open the media, to find errors before a network is loaded.

        Raises OptionError or MediaError for what LTX-2 cannot generate.
        """
        self.files.check(("dit",))
        # The request with its first image alone; raise OptionError if audio alone gets images
        if not self.files.has_images:
            self._reject_images(request)
        request = keep_usable_media(request, {**NO_MEDIA, "image_path": True}, f"{NAME} does not take it")
        media = with_request_values(self.input_media, request)
        self._check_media(request, media)
        size = self._resolve_size(request)
        references = RequestReferences(
            self._resolve_references(request, media), find_audio_reference(request)
        )
        self._check_min_size(*size)
        prepared = self._fill_in_defaults(request, size)
        joint = self._make_joint(prepared)
        self._check_audio(references.audio, joint, media)
        prepared = replace(
            prepared,
            audio_video_shapes=joint,
            rules=self._resolve_guidance(request, references),
            solver=SOLVER if prepared.solver == "euler" else prepared.solver,
            family_settings=references,
            extra_metadata=self._make_output_metadata(references, media),
        )
        if self.stages is not None:
            prepared = self.stages.split(prepared, self.latent, self.vae_dtype)
        self._check_references(prepared, references.images)
        if self.drive_video is not None:
            check_frames("--drive_video", self.drive_video, prepared.frames)
        check_media(media, prepared, self.latent)
        if media.paste_source is None:
            return prepared
        from ltx_2.source_pasting import add_pasting  # few requests ask for it

        return add_pasting(prepared, media, self.latent)

    def _fill_in_defaults(self, request: Request, size: tuple[int, int, int]) -> Prepared:
        """Resolve a request for a width, height and number of frames; unset values get the defaults."""
        flow_shift = request.flow_shift or self.defaults.flow_shift
        assert flow_shift is not None
        return resolve_request(
            request,
            self.defaults,
            size=size,
            flow_shift=flow_shift,
            default_negative=NEGATIVE_PROMPT,
        )

    def _resolve_size(self, request: Request) -> tuple[int, int, int]:
        """Return a request's width, height and frames; raise OptionError if latents cannot have this size."""
        # two stages need coarser steps of size and length
        latent = self.latent if self.stages is None else self.stages.with_coarser_steps(self.latent)
        width, height, frames = get_size(request, self.defaults)
        frames = full_frames(frames, latent)
        check_size((width, height, frames), latent)
        return width, height, frames

    def _check_min_size(self, width: int, height: int, frames: int) -> None:
        """Raise OptionError if a side of a video of LTX-2 2.0 has fewer than two latents."""
        latent = self.latent if self.stages is None else self.stages.with_coarser_steps(self.latent)
        minimum = 2 * latent.pixel_step
        if min(width, height) < minimum and self.version == "2.0":
            raise OptionError(
                f"--video_size {height} {width}: version 2.0 needs sides of {minimum} pixels or more"
            )

    def _check_audio(
        self, reference: Path | None, joint: AudioVideoShapes | None, media: Ltx2GivenMedia
    ) -> None:
        """Raise OptionError if a driving video or an audio reference would have no effect."""
        # `joint` is None if no audio is generated.
        if self.drive_video is not None and joint is None:
            raise OptionError(
                f"--drive_video {self.drive_video}: a single image has no audio. Use a longer --video_length"
            )
        if reference is not None:
            # Raise OptionError if a request's audio reference would have no effect
            if not self.strategy.takes_audio:
                raise OptionError(
                    f"--{REFERENCE_AUDIO_OPTION} {reference}: --ic_lora_strategy does not take it. Omit one "
                    "of them"
                )
            if joint is None:
                raise OptionError(
                    f"--{REFERENCE_AUDIO_OPTION} {reference}: no audio is generated from it. Pass "
                    "--ltx2_mode av, and more than one frame"
                )
            if media.drive_audio is not None:
                raise OptionError(
                    f"--{REFERENCE_AUDIO_OPTION} {reference} and --drive_audio {media.drive_audio}: the "
                    "latter already is the entire audio. Pass one of them"
                )

    def _check_media(self, request: Request, media: Ltx2GivenMedia) -> None:
        """Raise OptionError if the request's media contradict each other or cannot be opened."""
        if request.image_path is not None and self.drive_video is not None:
            raise OptionError("--image_path and --drive_video: the video sets all frames. Pass one of them")
        if self.drive_video is not None and self.stages is not None:
            raise OptionError(
                "--drive_video and --sample_two_stage: frames of the video do not change. Pass one of them"
            )
        self._check_generated_keyframes()
        if request.source is not None and (media.image_files or media.audio_files):
            raise OptionError(
                f"--{request.source.option} and given parts of the result, which start from noise: omit "
                "one of them"
            )
        if media.image_files:
            # Raise OptionError if `option`, which gives images of the result, contradicts another option
            option = next(iter(media.image_files))
            if self.stages is not None and TEMPORAL in self.stages.upscalers:
                raise OptionError(
                    f"--{option} and {TEMPORAL}: the first stage has half of the frames. Omit one of them"
                )
            if self.drive_video is not None:
                raise OptionError(
                    f"--drive_video and --{option}: the video sets all frames. Pass one of them"
                )
        if request.image_path is not None:
            check_opens("image_path", request.image_path, is_image=True)
        if self.drive_video is not None:
            check_opens("drive_video", self.drive_video, is_image=False)

    def _check_generated_keyframes(self) -> None:
        """Raise OptionError if --num_generated_keyframes does not fit the network or another option."""
        count = self.input_media.num_generated_keyframes
        if not count:
            return
        option = f"--num_generated_keyframes {count}"
        if self.version != "2.5":
            raise OptionError(
                f"{option}: LTX-{self.version} has no embedding that marks them. Use LTX-2.5, or omit it"
            )
        if self.drive_video is not None:
            raise OptionError(f"{option} and --drive_video: the video sets all frames. Pass one of them")
        if self.reference_strength < 1:
            raise OptionError(
                f"{option} and --reference_strength {self.reference_strength:g}: denoised "
                "references replace them. Omit one of them"
            )

    def _make_joint(self, prepared: Prepared) -> AudioVideoShapes | None:
        """Return the joint shape of video and audio latents; None without audio, as for a single image."""
        audio = self.audio
        trains_only_audio = not self.files.has_images
        if audio is None or not self.makes_audio or (prepared.frames <= 1 and not trains_only_audio):
            return None
        _, channels, length, rows, columns = self.latent.shape(
            prepared.frames, prepared.height, prepared.width
        )
        image = (channels, 0 if trains_only_audio else length, rows, columns)
        return AudioVideoShapes(image, audio.shape(prepared.frames, prepared.fps))

    def _resolve_guidance(self, request: Request, references: RequestReferences) -> rules.GuidanceRules:
        (num_blocks,) = self.block_counts()
        has_audio_reference = references.audio is not None
        return guidance_rules(
            self.guidance,
            scale=request.guidance_scale,
            num_blocks=num_blocks,
            perturbed_block=RELEASES[self.version].perturbed_block,
            audio_only=not self.files.has_images,
            identity_scale=self.audio_references.identity_scale if has_audio_reference else 0.0,
        )

    def _make_output_metadata(self, references: RequestReferences, media: Ltx2GivenMedia) -> dict[str, str]:
        """Return the metadata for saved files that describe input media, references and stages."""
        metadata = media.metadata
        if references.audio is not None:
            metadata[REFERENCE_AUDIO_OPTION] = references.audio.name
            if self.audio_references.identity_scale:
                metadata[IDENTITY_SCALE] = f"{self.audio_references.identity_scale:g}"
        if references.images:
            metadata |= self._describe_references(references.images)
        if self.stages is not None:
            metadata |= self.stages.metadata
        return metadata

    def _describe_references(self, images: Sequence[Path]) -> dict[str, str]:
        """Return the metadata of a request's reference images or clips, and of how they are used."""
        metadata = {"reference_video": ", ".join(path.name for path in images)}
        if self.reference_strength < 1:
            metadata["reference_strength"] = f"{self.reference_strength:g}"
        mask, strength = self.reference_attention
        if mask is not None:
            metadata["conditioning_attention_mask"] = f"{mask.name} {strength:g}"
        elif strength != 1:
            metadata["conditioning_attention_mask"] = f"{strength:g}"
        return metadata

    def _check_references(self, prepared: Prepared, references: Sequence[Path]) -> None:
        """Raise OptionError or MediaError if references do not fit the sizes of the request's stages."""
        if not references or self.references is None:
            return
        stages = prepared.stages or (prepared,)
        check_sides(stages[0].width, stages[0].height, self.references)
        mask, _ = self.reference_attention
        for stage in stages:
            check_references(
                references,
                mask=mask,
                frames=stage.frames,
                rules=self.references,
                latent=self.latent,
            )

    def _reject_images(self, request: Request) -> None:
        """Raise OptionError for image or video options when only audio is generated."""
        images = {
            "image_path": request.image_path,
            "drive_video": self.drive_video,
            "sample_two_stage": self.stages,
            "reference_video": request.extra.get("reference_video"),
            "num_generated_keyframes": self.input_media.num_generated_keyframes,
            **with_request_values(self.input_media, request).image_files,
            "video_path": request.source,
        }
        for name, image in images.items():
            if image:
                raise OptionError(f"--{name} with --ltx2_mode audio: audio alone has no images. Omit it")

    def _resolve_references(self, request: Request, media: Ltx2GivenMedia) -> tuple[Path, ...]:
        """Return the paths of the request's references. Raises OptionError if they cannot be used."""
        if media.inpaint_source is not None and self.input_media.inpaint_source is None:
            return ()  # --inpaint_source was not given: the only reference video became the clip to inpaint
        names = request.extra.get("reference_video", "").split("\n")
        paths = tuple(to_path("--reference_video", name) for name in names if name)
        if not paths:
            return ()
        if self.references is None:
            raise OptionError("--ic_lora_strategy none with references: omit one of them")
        if len(paths) > MAX_REFERENCES:
            raise OptionError(
                f"--reference_videos: {len(paths)} references, but at most {MAX_REFERENCES} are supported"
            )
        # Raise an error if references, or the mask that limits the attention to them, cannot be opened
        for path in paths:
            check_opens("reference_video", path, is_image=is_single_image(path))
        mask, _ = self.reference_attention
        if mask is not None:
            check_opens("conditioning-attention-mask", mask, is_image=is_single_image(mask))
        if self.reference_strength < 1:
            # Raise OptionError if the request gives frames of the result while references are denoised
            medium = (
                request.image_path
                or self.drive_video
                or (request.source and request.source.option)
                or next(iter([*media.image_files, *media.audio_files]), None)
            )
            if medium:
                raise OptionError(
                    f"--reference_strength {self.reference_strength:g} and {medium}: references that are "
                    "denoised cannot be combined with given frames. Omit one of them"
                )
        return paths

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether the request has an image, a driving video or references."""
        media = with_request_values(self.input_media, prepared.request)
        return (
            prepared.request.image_path is not None
            or self.drive_video is not None
            or prepared.family_settings.are_given
            or bool(media.image_files or media.audio_files)
        )

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the first image or the driving video, and the references. All latents are on the CPU."""
        if not prepared.stages:
            conditions = self._encode_request(encoders.vae, prepared)
            return {0: conditions} if conditions else {}
        by_stage = {}
        for index, stage in enumerate(prepared.stages):
            conditions = self._encode_request(encoders.vae, stage)
            if conditions:
                by_stage[index] = conditions
        return by_stage

    def _encode_request(self, vae: Any, prepared: Prepared) -> dict[str, Tensor]:
        """Return the media conditions of a request that has no stages."""
        conditions = self._encode_references(vae, prepared)
        if prepared.family_settings.audio is not None:
            # The latents of the audio reference, 1 C T M, on the CPU
            assert self.audio is not None  # `prepare` checks it
            rate = self.audio.rate
            seconds = prepared.frames / prepared.fps
            samples = read_reference(prepared.family_settings.audio, seconds, rate, self.audio.channels)
            networks = self.audio_networks(_get_vae_device(vae), decodes=False)
            # its own length, in samples
            latents = self.encode_audio(networks, torch.from_numpy(samples)[None], samples.shape[1], rate)
            conditions[REFERENCE_AUDIO] = latents.float().cpu()
        conditions |= self._encode_given(vae, prepared)
        pixels = self._read_frames(prepared)
        if pixels is None:
            return conditions
        return {FIRST_LATENTS: vae.encode(pixels.to(vae.device)).float().cpu(), **conditions}

    def _encode_given(self, vae: Any, prepared: Prepared) -> dict[str, Tensor]:
        """Return the latents of the given images, keyframes and audio, and how clean each of them stays."""
        # The audio VAE is loaded only for an audio file or --retake.
        media = with_request_values(self.input_media, prepared.request)

        def encode_pixels(pixels: Tensor) -> Tensor:
            return vae.encode(pixels.to(vae.device)).float().cpu()

        conditions = encode_images(media, prepared, encode_pixels, self.latent, crf=self._crf)
        conditions |= encode_keyframes(media.keyframes, prepared, encode_pixels, self._crf)
        if self.audio is None or not (media.audio_files or media.retake):
            return conditions
        networks = self.audio_networks(_get_vae_device(vae), decodes=False)

        def encode(samples: Tensor, frames: int, fps: float) -> Tensor:
            return self.encode_audio(networks, samples, frames, fps)

        return {**conditions, **encode_given_audio(media, prepared, encode, self.audio)}

    def _encode_references(self, vae: Any, prepared: Prepared) -> dict[str, Tensor]:
        """Return the latents of reference images or clips, and how strongly the video attends to each token.

        The strengths are left out if all are 1.
        """
        reference_rules = self.references
        images = prepared.family_settings.images
        if not images or reference_rules is None:
            return {}
        size = (prepared.width, prepared.height, prepared.frames)
        pixels = [read_pixels(path, size, reference_rules, self.latent) for path in images]
        conditions = {}
        for index, clip in enumerate(pixels):
            conditions[reference_key(index)] = vae.encode(clip.to(vae.device)).float().cpu()
        mask, strength = self.reference_attention
        num_tokens = sum(latents[0, 0].numel() for latents in conditions.values())
        if mask is not None:
            mask_strengths = read_strengths(mask, pixels, reference_rules, self.latent)
            conditions[REFERENCE_STRENGTHS] = (strength * mask_strengths).expand(1, num_tokens)
        elif strength < 1:
            conditions[REFERENCE_STRENGTHS] = (strength * torch.ones(1)).expand(1, num_tokens)
        return conditions

    def _read_frames(self, prepared: Prepared) -> Tensor | None:
        """Return the pixels of the driving video, else of the first image; None without either."""
        path = prepared.request.image_path
        if self.drive_video is not None:
            return video_pixels(
                self.drive_video,
                "--drive_video",
                width=prepared.width,
                height=prepared.height,
                frames=prepared.frames,
            )
        if path is None:
            return None
        return image_pixels(path, prepared.width, prepared.height, crf=self._crf)

    @property
    def _crf(self) -> int:
        return RELEASES[self.version].crf if self.image_crf is None else self.image_crf

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the sections; noise is drawn for video first, then for audio, then for references."""
        sections = cut_appended_frames(self._make_plain_sections(prepared, prompts, inputs, noise))
        if self.reference_strength < 1:
            sections = with_noisy_references(
                sections, self.reference_strength, prepared.audio_video_shapes, noise
            )
        return (yield from sections)

    def _make_plain_sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield a section for each stage to the sampler; return the final latents. References stay clean."""
        draw_noise = partial(self._draw_noise, noise=noise)
        make_section = partial(self._make_section, prompts=prompts[0], inputs=inputs, noise=noise)
        # a request without stages, such as that of a dry run that measures memory
        if self.stages is None or not prepared.stages:
            return (yield make_section(prepared, 0, draw_noise(prepared)))
        enlarge_clip = partial(
            enlarge,
            upscalers=self.stages.upscalers,
            vae=self.files.vae_path,
            dtype=self.vae_dtype,
        )
        sections = stage_sections(
            prepared,
            draw_noise=draw_noise,
            make_section=make_section,
            enlarge=enlarge_clip,
            noise=noise,
        )
        return (yield from sections)

    def _draw_noise(self, stage: Prepared, noise: NoiseSource) -> Tensor:
        """Draw the noise from which a stage starts: video noise, then audio noise, joined."""
        joint = stage.audio_video_shapes
        if joint is None:
            return noise.draw(self.latent.shape(stage.frames, stage.height, stage.width))
        image = noise.draw((1, *joint.image))
        audio = noise.draw((1, *joint.audio))
        return joint.join(image, audio)

    def _make_section(
        self,
        stage: Prepared,
        index: int,
        start: Tensor,
        prompts: EncodedPrompts,
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Section:
        """Return the denoising section of a stage, with its clean latents and keyframes."""
        # the frame rate is stored as an integer, in thousandths
        conditions = {**inputs.get(index, {}), FPS: torch.tensor([round(1000 * stage.fps)])}
        first_frames = conditions.pop(FIRST_LATENTS, None)
        clean_latents = pop_clean_latents(conditions)
        keyframes = pop_keyframes(conditions)
        if index == 0:  # only the first stage generates keyframes
            shape = self.latent.shape(stage.frames, stage.height, stage.width)
            count = self.input_media.num_generated_keyframes
            keyframes = add_generated_keyframes(keyframes, count, stage.frames, shape)
        section = prompts.section(start, conditions)
        if isinstance(first_frames, Tensor):
            overrides = Overrides(num_clean_frames=first_frames.shape[2])
            section = replace(section, clean_frames=first_frames, overrides=overrides)
        if clean_latents:
            section = fix_clean_latents(section, clean_latents, stage.audio_video_shapes)
        if keyframes:
            start_sigma = stage.sigmas[0] if stage.sigmas else 1.0
            section = append_keyframes(section, keyframes, stage.audio_video_shapes, noise, start_sigma)
        return section


def _get_vae_device(vae: Any) -> torch.device:
    """Return the video VAE's device, which the audio VAE uses too; the CPU without images."""
    device: torch.device = torch.device("cpu") if vae is None else vae.device
    return device


def _name_texts(conditions: Conditions, device: torch.device) -> dict[str, Tensor]:
    """Return the text embeddings of the conditions, keyed by the names of the network's arguments."""
    names = {"text": prompt_key(VIDEO), "audio_text": prompt_key(AUDIO)}
    present = {argument: name for argument, name in names.items() if name in conditions}
    return name_texts(conditions, present, device)


def _find_tensor(conditions: Conditions, name: str) -> Tensor | None:
    """Return a condition that is one tensor; None if it is missing or a list of tensors."""
    value = conditions.get(name)
    return value if isinstance(value, Tensor) else None


def family_for_latent_caching(options: Ltx2LatentCachingOptions) -> Ltx2:
    """Build the model description for ltx2_cache_latents.py, which needs only the VAE."""
    model = options.model
    log_ignored(model.streams, options, options.vae, options.references)
    files = Ltx2Files(checkpoint=model.ltx2_checkpoint, streams=model.streams).add_vaes(options.vae)
    return Ltx2(files, references=make_rules(options.references))


def family_for_text_caching(options: Ltx2TextCachingOptions) -> Ltx2:
    """Build the model description for ltx2_cache_text_encoder_outputs.py: only the text encoder."""
    model = options.model
    files = Ltx2Files(checkpoint=model.ltx2_checkpoint, streams=model.streams)
    return Ltx2(files.add_text(options.text, options.text_dtype))


def family_for_training(options: Ltx2TrainingOptions) -> Ltx2:
    """Build the model description for LTX-2's training scripts, with noise, loss and reference options."""
    options = apply_conditioning_config(options)
    files = make_model_files(options, options.model.streams)
    check_version(files, options)
    trains_only_audio = not files.has_images  # video latents are then placeholders
    log_ignored(
        files.streams,
        options,
        options.vae,
        options.references,
        options.guidance,
        options.audio_references,
    )
    strategy = options.strategy
    takes_images = strategy.takes_images and not trains_only_audio
    if not strategy.takes_audio:
        warn_about_unused_options(options.audio_references, options.strategy_option)
    # both insert guide images; the first also uses masks to select clean latents, not to weight the loss
    return Ltx2(
        files,
        guidance=options.guidance,
        noise=replace(
            NOISE,
            first_frame_probability=options.first_frame_probability,
            shifted_logit=shifted_logit(options.sigmas, files),
            clean_token_rule=make_clean_latent_rules(options.given),
            # both insert guide images; the first also uses masks to select clean latents,
            # not to weight the loss
            change_conditions=select_clean_latents_by_mask
            if options.given.ltx2_inpaint_mask
            else insert_guides,
        ),
        dit=replace(DIT, lora_include=LORA_PRESETS[options.lora_target_preset]),
        audio_learning=rules.AudioLearning(
            options.video_loss_weight,
            options.audio_loss_weight,
            options.independent_audio_timestep or trains_only_audio,
            rules.IMAGE_STREAM if trains_only_audio else CLEAN_STREAMS[options.ltx2_train_direction],
        ),
        size=(options.width, options.height, options.sample_num_frames),
        makes_audio=not options.silent,
        stages=two_stages(options.stages),
        options=options,
        references=_resolve_training_references(options) if takes_images else None,
        strategy=strategy,
        audio_references=make_audio_rules(options.audio_references),
        reference_dropout_rate=1 - options.ic_lora_ref_probability,
    )


def _resolve_training_references(options: Ltx2TrainingOptions) -> rules.ReferenceRules:
    dropped = 1 - options.ic_lora_ref_probability
    is_v2v = options.strategy is STRATEGIES["v2v"]
    edits = dropped > 0 or is_v2v or VIDEO in options.strategy.needs
    return replace(make_rules(options.references), dropout_probability=dropped, edits_images=edits)


def family_for_generation(options: Ltx2GenerationOptions) -> Ltx2:
    """Build the model description for ltx2_generate_video.py, with guidance, stages, media and references."""
    streams = (VIDEO,) if options.silent else options.streams
    log_ignored(streams, options, options.vae, options.guidance, options.audio_references)
    audio_options = options.audio_references
    return Ltx2(
        make_model_files(options, streams),
        options.guidance,
        image_crf=options.image_crf,
        input_media=options.given,
        drive_video=options.drive_video,
        stages=two_stages(options.stages),
        references=None if options.ic_lora_strategy == "none" else make_rules(options.references),
        reference_strength=options.references.strength,
        reference_attention=options.references.attention,
        strategy=STRATEGIES["none" if options.ic_lora_strategy == "none" else AUTO],
        audio_references=AudioReferenceRules(
            bool(audio_options.ends_before_audio), identity_scale=audio_options.identity_scale
        ),
    )


_: type[Family] = Ltx2
_hears: type[HearsAudio] = Ltx2
