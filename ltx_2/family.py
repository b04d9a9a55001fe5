"""LTX-2, 2.3 and 2.5, described for the shared loops: video, with or without sound."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ltx_2.blocks import LtxReferences
from ltx_2.configs import DIT, LORA_PRESETS, NEGATIVE_PROMPT, NOISE, RELEASES
from ltx_2.files import Ltx2Files, check_version, files_of, shifted_logit
from ltx_2.guidance import guidance_rules
from ltx_2.media import Ltx2Media
from ltx_2.model_options import AUDIO, VIDEO, Ltx2GuidanceOptions
from ltx_2.names import LORA
from ltx_2.options import (
    NAME,
    Ltx2GenerationOptions,
    Ltx2LatentCachingOptions,
    Ltx2TextCachingOptions,
    Ltx2TrainingOptions,
    tell_ignored,
)
from ltx_2.reference_options import MOST
from ltx_2.references import (
    STRENGTHS,
    check_references,
    check_sides,
    factor_metadata,
    is_picture,
    join_tokens,
    pack,
    read_pixels,
    read_strengths,
    reference_key,
    references_of,
    rules_of,
    thin_out,
    unpack,
    velocity_of_references,
    with_noisy_references,
)
from ltx_2.stages import TwoStages, stage_sections, two_stages
from ltx_2.text_encoder import MASK, prompt_key
from ltx_2.upscaler import enlarge
from modules.contract import rules
from modules.contract.data import (
    FIRST_FRAME,
    FPS,
    HAS_SOUND,
    REFERENCE_LATENTS,
    Batch,
    CacheEntry,
    Conditions,
    Joint,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
    name_texts,
)
from modules.contract.family import Abilities, DitSpec, Family, HearsSound, NoiseSource, NoiseSpec
from modules.contract.few_steps import FewSteps
from modules.contract.loading import Placement
from modules.contract.requests import (
    NO_MEDIA,
    Prepared,
    Request,
    check_frames,
    check_opens,
    check_size,
    keep_usable_media,
    settle,
    size_of,
    whole_frames,
)
from modules.contract.steps import NO_TWEAKS, EncodedPrompts, Section, Tweaks
from modules.errors import DatasetError, OptionError
from modules.media.pixels import image_pixels, to_pixels, video_pixels
from modules.options import NO_OPTIONS

FIRST = "first_latents"  # condition: clean latents of the given frames in front, B C F H W
SOLVER = "euler-tenth"
# --ltx2_train_direction -> the stream that is given
GIVEN = {"joint": "", "a2v": rules.SOUND_STREAM, "v2a": rules.PICTURE_STREAM}


@dataclass(frozen=True)
class Ltx2(Ltx2Media):
    """Description of LTX-2 for one run, built by the `family_for_...` functions below."""

    files: Ltx2Files
    guidance: Ltx2GuidanceOptions = Ltx2GuidanceOptions.usual()
    noise: NoiseSpec = NOISE
    dit: DitSpec = DIT
    sound_learning: rules.SoundLearning = rules.SoundLearning()
    size: tuple[int, int, int] = (768, 512, 121)  # width, height, frames where nothing is said
    image_crf: int | None = None  # H.264 quality at which the first image is seen; None: the release's
    drive_video: Path | None = None  # of a generation: it stays as it is, and its sound is made
    makes_sound: bool = True  # False: samples of a training with sound are silent
    stages: TwoStages | None = None
    options: Any = NO_OPTIONS  # of a training
    references: rules.ReferenceRules | None = rules.ReferenceRules(MOST, clips=True)
    reference_strength: float = 1.0  # of a generation; below 1 they are denoised too
    reference_attention: tuple[Path | None, float] = (None, 1.0)  # mask and strength

    can: ClassVar = Abilities(hear=True, rate=True, tell_few_steps=True)
    name: str = field(default="ltx2_v1", init=False)
    few_steps: ClassVar = FewSteps(
        "Train on the transformer called dev, whose LoRAs work on the distilled one too, or give "
        "--training_adapter with a LoRA that undoes the distillation"
    )
    cache_tag: str = field(default="ltx2", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)

    @property
    def vae_dtype(self) -> torch.dtype:
        return self.files.beside(self.files.vae_dtype)

    @property
    def version(self) -> str:
        """Return the release of the transformer's file; "2.3" without a transformer."""
        return "2.3" if self.files.dit is None else self.files.dit_header().config.kind

    @property
    def fuller(self) -> tuple[str, ...]:
        return (*super().fuller, FIRST_FRAME)

    @property
    def defaults(self) -> SamplingDefaults:
        """Defaults of a generation. The flow shift is that of 4096 tokens at any size, as released."""
        width, height, frames = self.size
        shift, steps = rules.ShiftedLogit().shift(4096), RELEASES[self.version].steps
        made = SamplingDefaults(steps, 24.0, 3.0, None, shift, SOLVER, width, height, frames)
        return replace(made, extras=("reference_video",))

    @property
    def release(self) -> rules.ModelRelease:
        return RELEASES[self.version].release

    @property
    def metadata(self) -> Mapping[str, str]:
        names = {
            "architecture": f"ltx-{self.version}",
            "implementation": "https://github.com/Lightricks/LTX-2",
            "model_type": self.name,
        }
        asked = [getattr(self.options, name, None) for name in ("ic_lora_strategy", "lora_target_preset")]
        if self.references is not None and ("v2v" in asked or self.references.factors[:2] != (1, 1)):
            names |= factor_metadata(self.references)
        return self.metadata_of(names)

    # encoding

    @property
    def text_keys(self) -> frozenset[str]:
        return frozenset({*map(prompt_key, self.files.streams), MASK})

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has control media: references of LTX-2 have keys of their own."""
        if table.has_control:
            raise DatasetError(
                f"{table.name}: LTX-2 follows no control clips. What a clip is made from is a reference: "
                "name its folder reference_directory, not control_directory, and in lists reference_path."
            )

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        vae, dtype = encoders.vae, self.vae_dtype
        entries = []
        if not self.files.has_pictures:
            shape = self.latent.shape(*media.frames.shape[1:4])[1:]
            return [[CacheEntry({"latents": torch.zeros(shape, dtype=dtype)})] for _ in media.keys]
        for part in media.split_for(vae.device):
            named = {"latents": part.frames}
            for number, frames in enumerate(part.references):
                assert self.references is not None
                named[reference_key(number)] = thin_out(frames, self.references, self.latent.frame_step)
            made = {name: vae.encode(to_pixels(one.to(vae.device))).to(dtype) for name, one in named.items()}
            entries += [
                [CacheEntry({name: each[index] for name, each in made.items()})]
                for index in range(len(part.keys))
            ]
        return entries

    # the network

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        network = self.files.load_dit(placement)
        network.spec = self.dit
        if self.stages is not None and self.stages.loras:
            vars(network)["stage_files"] = [(path, option) for path, option, *_ in self.stages.loras]
        return network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions for training: texts of the streams, frame rates, which samples have sound."""
        needed = self.files.check_cached_texts(batch)
        found = {name: batch.tensors[name] for name in (*needed, FPS, HAS_SOUND) if name in batch.tensors}
        return found | {
            name: one for name, one in batch.tensors.items() if name.startswith(REFERENCE_LATENTS)
        }

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        """Predict the velocity in float32: B C F H W, or B N of video and sound joined.

        cond: video_prompt_embeds, audio_prompt_embeds B T C; FPS and HAS_SOUND.
        """

        def texts(given: Conditions) -> dict[str, Tensor]:
            names = {"text": prompt_key(VIDEO), "sound_text": prompt_key(AUDIO)}
            return name_texts(
                given, {key: name for key, name in names.items() if name in given}, noisy.device
            )

        joint = tweaks.joint
        picture, sound = (noisy, None) if joint is None else joint.split(noisy)
        is_alone = not self.files.has_pictures
        times = timesteps.unbind(1) if timesteps.ndim == 2 else (timesteps, timesteps)
        rates, has_sound = cond.get(FPS), cond.get(HAS_SOUND)
        clean = [self.latent.to_model(one.to(noisy.device)) for one in references_of(cond)]
        share = 1 - self.reference_strength if clean else 0.0
        shown, tokens, noisy_tokens = clean, torch.empty(0), torch.empty(0)
        if share:
            tokens = join_tokens(clean)
            picture, noisy_tokens = unpack(picture, tokens.shape[2])
            parts = noisy_tokens.split([one[0, 0].numel() for one in clean], dim=2)
            shown = [x.unflatten(2, one.shape[2:]) for x, one in zip(parts, clean, strict=True)]
        strengths = cond.get(STRENGTHS)
        references = LtxReferences(
            shown,
            1 if self.references is None else self.references.time_factor,
            share,
            strengths[0].to(noisy.device) if isinstance(strengths, Tensor) else None,
        )
        velocity, heard = dit(
            None if is_alone else picture,
            times[0],
            fps=[rate / 1000 for rate in rates.tolist()] if isinstance(rates, Tensor) else self.defaults.fps,
            sound=sound,
            sound_timesteps=times[1],
            has_sound=None if sound is None or not isinstance(has_sound, Tensor) else has_sound,
            tweaks=tweaks.rename_away(texts),
            references=references,
            **texts(cond),
        )
        if is_alone:
            velocity = torch.zeros_like(picture)
        if share:
            of_tokens, own = velocity.split([tokens.shape[2], picture[0, 0].numel()], dim=2)
            strength, sigma = self.reference_strength, times[0] / 1000
            of_tokens = velocity_of_references(of_tokens, noisy_tokens, tokens, strength, sigma)
            velocity = pack(own.unflatten(2, picture.shape[2:]), of_tokens)
        return velocity if joint is None else joint.join(velocity, heard)

    # generation

    def prepare(self, request: Request) -> Prepared:
        self.files.check(("dit",))
        is_alone = not self.files.has_pictures
        if is_alone:
            self._refuse_pictures(request)
        taken = {**NO_MEDIA, "image_path": True}
        request = keep_usable_media(request, taken, f"{NAME} does not take it")
        if request.image_path is not None and self.drive_video is not None:
            raise OptionError("--image_path and --drive_video: the video has all frames. Give one of them")
        if self.drive_video is not None and self.stages is not None:
            raise OptionError("--drive_video and --sample_two_stage: its pictures stay. Give one of them")
        for name, path in (("image_path", request.image_path), ("drive_video", self.drive_video)):
            if path is not None:
                check_opens(name, path, is_image=name == "image_path")
        latent = self.latent
        steps = latent if self.stages is None else self.stages.whole(latent)
        width, height, frames = size_of(request, self.defaults)
        frames = whole_frames(frames, steps)
        check_size((width, height, frames), steps)
        given = self._references_for(request)
        if min(width, height) < 2 * steps.pixel_step and self.version == "2.0":
            least = 2 * steps.pixel_step
            raise OptionError(
                f"--video_size {height} {width}: version 2.0 makes {least} pixels a side or more"
            )
        usual, shift = self.defaults, request.flow_shift or self.defaults.flow_shift
        assert shift is not None
        prepared = settle(request, usual, (width, height, frames), shift, NEGATIVE_PROMPT)
        joint, sound = None, self.sound
        if sound is not None and (frames > 1 or is_alone) and self.makes_sound:
            _, channels, length, *sides = latent.shape(frames, height, width)
            picture = (channels, 0 if is_alone else length, sides[0], sides[1])
            joint = Joint(picture, sound.shape(frames, prepared.fps))
        if self.drive_video is not None and joint is None:
            raise OptionError(
                f"--drive_video {self.drive_video}: a single picture has no sound. Make it longer"
            )
        solver = SOLVER if prepared.solver == "euler" else prepared.solver
        said = {"reference_video": ", ".join(path.name for path in given)} if given else {}
        if given and self.reference_strength < 1:
            said["reference_strength"] = f"{self.reference_strength:g}"
        if given and self.reference_attention != (None, 1):
            mask, strength = self.reference_attention
            said["conditioning_attention_mask"] = f"{mask.name} {strength:g}" if mask else f"{strength:g}"
        if self.stages is not None:
            said |= self.stages.said
        (count,) = self.block_counts()
        perturbed = RELEASES[self.version].perturbed
        told = guidance_rules(self.guidance, request.guidance_scale, count, perturbed, is_alone)
        prepared = replace(prepared, joint=joint, rules=told, solver=solver)
        prepared = replace(prepared, own=given, own_metadata=said)
        if self.stages is not None:
            prepared = self.stages.split(prepared, latent, self.vae_dtype)
        if given and self.references is not None:
            small = prepared.stages[0] if prepared.stages else prepared
            check_sides(small.width, small.height, self.references)
            mask, _ = self.reference_attention
            for stage in prepared.stages or (prepared,):
                check_references(given, mask, stage.frames, self.references, self.latent)
        if self.drive_video is not None:
            check_frames("--drive_video", self.drive_video, prepared.frames)
        return prepared

    def _refuse_pictures(self, request: Request) -> None:
        given = {
            "image_path": request.image_path,
            "drive_video": self.drive_video,
            "sample_two_stage": self.stages,
            "reference_video": request.extra.get("reference_video"),
            "video_path": request.source,
        }
        for name in (name for name, one in given.items() if one):
            raise OptionError(f"--{name} with --ltx2_mode audio: sound alone has no pictures. Leave it out")

    def _references_for(self, request: Request) -> tuple[Path, ...]:
        lines = request.extra.get("reference_video", "").split("\n")
        paths = tuple(Path(line) for line in lines if line)
        if paths and self.references is None:
            raise OptionError("--ic_lora_strategy none: references are given. Leave them or the option out")
        if len(paths) > MOST:
            raise OptionError(f"--reference_videos: {len(paths)} references, at most {MOST} are taken")
        for path in paths:
            check_opens("reference_video", path, is_image=is_picture(path))
        if paths and (mask := self.reference_attention[0]) is not None:
            check_opens("conditioning-attention-mask", mask, is_image=is_picture(mask))
        others = request.image_path or self.drive_video or (request.source and request.source.option)
        if paths and others and self.reference_strength < 1:
            raise OptionError(
                f"--reference_strength {self.reference_strength:g} and {others}: references that are "
                "denoised stand beside no frames that are given. Leave one of them out"
            )
        return paths

    def needs_media(self, prepared: Prepared) -> bool:
        return prepared.asked.image_path is not None or self.drive_video is not None or bool(prepared.own)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the image (the first latent frame) or the driving video, and references; on the CPU."""
        if prepared.stages:
            given = (self.request_conditions(encoders, one) for one in prepared.stages)
            return {number: one[0] for number, one in enumerate(given) if one}
        path, size = prepared.asked.image_path, (prepared.width, prepared.height)
        vae, found = encoders.vae, dict[str, Tensor]()
        if prepared.own and (told := self.references) is not None:
            shown = [read_pixels(one, (*size, prepared.frames), told, self.latent) for one in prepared.own]
            for number, one in enumerate(shown):
                found[reference_key(number)] = vae.encode(one.to(vae.device)).float().cpu()
            mask, strength = self.reference_attention
            if mask is not None or strength < 1:
                white = torch.ones(1) if mask is None else read_strengths(mask, shown, told, self.latent)
                count = sum(one[0, 0].numel() for one in found.values())
                found[STRENGTHS] = (strength * white).expand(1, count)
        if self.drive_video is not None:
            pixels = video_pixels(self.drive_video, "--drive_video", *size, prepared.frames)
        elif path is not None:
            crf = RELEASES[self.version].crf if self.image_crf is None else self.image_crf
            pixels = image_pixels(path, *size, crf=crf)
        else:
            return {0: found} if found else {}
        return {0: {FIRST: vae.encode(pixels.to(vae.device)).float().cpu(), **found}}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the sections. Noise is drawn for video, then for sound, then for references."""
        made = self._plain_sections(prepared, prompts, inputs, noise)
        if self.reference_strength < 1:
            made = with_noisy_references(made, self.reference_strength, prepared.joint, noise)
        return (yield from made)

    def _plain_sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        def draw(made: Prepared) -> Tensor:
            joint = made.joint
            if joint is None:
                return noise.draw(self.latent.shape(made.frames, made.height, made.width))
            return joint.join(*(noise.draw((1, *shape)) for shape in (joint.picture, joint.sound)))

        def begin(made: Prepared, number: int, start: Tensor) -> Section:
            conditions = {**inputs.get(number, {}), FPS: torch.tensor([round(1000 * made.fps)])}
            first = conditions.pop(FIRST, None)
            section = prompts[0].section(start, conditions)
            if isinstance(first, Tensor):
                section = replace(section, given=first, tweaks=Tweaks(given_frames=first.shape[2]))
            return section

        if self.stages is None or not prepared.stages:  # one stage of two is rehearsed by itself
            return (yield begin(prepared, 0, draw(prepared)))
        larger = partial(
            enlarge,
            upscalers=self.stages.upscalers,
            vae=self.files.vae_path,
            dtype=self.vae_dtype,
        )
        return (yield from stage_sections(prepared, draw, begin, larger, noise))


def family_for_latent_caching(options: Ltx2LatentCachingOptions) -> Ltx2:
    model = options.model
    files = Ltx2Files(checkpoint=model.ltx2_checkpoint, streams=model.streams).add_vaes(options.vae)
    return Ltx2(files, references=rules_of(options.references))


def family_for_text_caching(options: Ltx2TextCachingOptions) -> Ltx2:
    model = options.model
    files = Ltx2Files(checkpoint=model.ltx2_checkpoint, streams=model.streams)
    return Ltx2(files.add_text(options.text, options.text_dtype))


def family_for_training(options: Ltx2TrainingOptions) -> Ltx2:
    """Describe the family for ltx2_train_network.py."""
    files = files_of(options, options.model.streams)
    check_version(files, options)
    is_alone = not files.has_pictures  # pictures then hold a place, and the noise level goes by the sound
    if is_alone:
        tell_ignored(options, options.references, options.guidance)
    learning = rules.SoundLearning(
        options.video_loss_weight,
        options.audio_loss_weight,
        options.independent_audio_timestep or is_alone,
        rules.PICTURE_STREAM if is_alone else GIVEN[options.ltx2_train_direction],
    )
    dropped = 1 - options.ic_lora_ref_probability
    edits = dropped > 0 or "v2v" in (options.lora_target_preset, options.ic_lora_strategy)
    references = replace(rules_of(options.references), dropped=dropped, edits=edits)
    noise = replace(
        NOISE,
        first_frame_probability=options.first_frame_probability,
        shifted_logit=shifted_logit(options.sigmas, files),
    )
    return Ltx2(
        files,
        options.guidance,
        noise,
        replace(DIT, lora_choice=LORA_PRESETS[options.lora_target_preset]),
        learning,
        (options.width, options.height, options.sample_num_frames),
        makes_sound=not options.silent,
        stages=two_stages(options.stages),
        options=options,
        references=None if options.ic_lora_strategy == "none" or is_alone else references,
    )


def family_for_generation(options: Ltx2GenerationOptions) -> Ltx2:
    """Describe the family for ltx2_generate_video.py."""
    streams = (VIDEO,) if options.silent else options.streams
    if VIDEO not in streams:
        tell_ignored(options, options.guidance)
    return Ltx2(
        files_of(options, streams),
        options.guidance,
        image_crf=options.image_crf,
        drive_video=options.drive_video,
        stages=two_stages(options.stages),
        references=None if options.ic_lora_strategy == "none" else rules_of(options.references),
        reference_strength=options.references.strength,
        reference_attention=options.references.attention,
    )


_: type[Family] = Ltx2
_hears: type[HearsSound] = Ltx2
