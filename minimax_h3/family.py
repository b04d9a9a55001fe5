"""MiniMax-H3, described for the shared loops: video with sound."""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contract import rules
from contract.data import (
    Batch,
    CacheEntry,
    Conditions,
    Joint,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    MomentsBatch,
    MomentsRules,
    SamplingDefaults,
    Sound,
    SoundSpec,
    split_items,
)
from contract.family import Abilities, DitSpec, Family, HearsSound, NoiseSource, NoiseSpec
from contract.few_steps import FewSteps
from contract.requests import (
    NO_MEDIA,
    Prepared,
    Request,
    check_size,
    keep_usable_media,
    settle,
    size_of,
)
from contract.steps import NO_TWEAKS, EncodedPrompts, Section, Tweaks
from encoders.files import OneTransformer
from encoders.tiles import posterior_generator, sample_posterior
from minimax_h3.cache_marks import read_probe
from minimax_h3.conditions import TARGET_INDEX, H3Placement, grid_of, place_conditions
from minimax_h3.configs import DIT, NOISE, RELEASE
from minimax_h3.files import KEY, TAGS, H3Files, files_of
from minimax_h3.names import LORA
from minimax_h3.options import (
    FPS,
    FRAMES,
    LAST_FRAMES,
    LEAST_FRAMES,
    MOST_FRAMES,
    NAME,
    SIZE,
    STEPS,
    H3GenerationOptions,
    H3TrainingOptions,
)
from minimax_h3.sound import H3SoundVae
from minimax_h3.training_inputs import (
    CLEAN,
    Clean,
    clean_shares,
    noise_inputs,
    teacher_key,
    teacher_rows,
    told_media,
)
from minimax_h3.video_vae import H3VideoVae
from modules.devices import send
from modules.errors import CacheError, DatasetError, OptionError
from modules.media.pixels import to_pixels
from modules.options import NO_OPTIONS

logger = logging.getLogger(__name__)

TEXTS_AGAIN = "minimax_h3_cache_text_encoder_outputs.py"
SHIFT_OF_SOUND = "h3_shift_audio"  # in Request.extra
SOLVER = "euler"


@dataclass(frozen=True)
class MiniMaxH3(OneTransformer):
    """Description of MiniMax-H3 for one run, built by the `family_for_...` functions below."""

    files: H3Files
    noise: NoiseSpec = NOISE
    sound_learning: rules.SoundLearning = rules.SoundLearning()
    any_length: bool = False  # of a generation: also shorter and longer clips than the model knows
    options: Any = NO_OPTIONS  # of a training

    can: ClassVar = Abilities(
        hear=True,
        tell_few_steps=True,
        one_sample="MiniMax-H3 packs a clip with its text and sound in a sequence of its own",
        bring_empty=True,
        teacher_views=(rules.FIRST_LAST, rules.CLIP, rules.SUBJECT),
    )
    few_steps: ClassVar = FewSteps()
    named: ClassVar = {
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
    def latent(self) -> LatentSpec:
        return self.files.latent

    @property
    def sound(self) -> SoundSpec:
        return self.files.sound

    @property
    def defaults(self) -> SamplingDefaults:
        height, width = SIZE
        return SamplingDefaults(
            steps=STEPS,
            fps=FPS,
            guidance_scale=1.0,
            embedded_guidance=None,
            flow_shift=self.noise.base_shift,
            solver=SOLVER,
            width=width,
            height=height,
            frames=FRAMES,
            extras=(SHIFT_OF_SOUND,),
        )

    # encoding

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has control media or references, which are not built yet."""
        if table.has_control or table.has_references:
            raise DatasetError(
                f"{table.name}: {NAME} is trained on clips and their sound alone. Leave control and "
                "reference media out"
            )

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return samples of the posterior of clips, normalised, float32."""
        entries = []
        for part in media.split_for(encoders.vae.device):
            latents = _encode(encoders.vae, to_pixels(part.frames), part.keys)
            entries += [[entry] for entry in split_items({"latents": latents})]
        return entries

    @property
    def moments(self) -> MomentsRules:
        return MomentsRules(f"{NAME} is given clips alone. Leave out load_tensors")

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        raise DatasetError(f"load_tensors: {self.moments.refusal}.")

    @property
    def sound_identity(self) -> Mapping[str, str]:
        return self.files.sound_identity()

    def sound_networks(self, device: torch.device, decodes: bool) -> H3SoundVae:
        return self.files.load_sound(device)

    def encode_sound(self, networks: H3SoundVae, samples: Tensor, frames: int, fps: float) -> Tensor:
        return networks.encode_clip(samples, frames, FPS)

    def decode_sound(self, networks: H3SoundVae, latents: Tensor) -> Sound:
        return networks.decode(latents)

    # the network

    def empty_text(self) -> Mapping[str, Tensor]:
        """Return the states and tags of the empty prompt in --h3_guidance_loss_uncond_cache, if given."""
        path = self.options.targets.h3_guidance_loss_uncond_cache
        if path is None:
            return {}
        states, tags = read_probe(path)
        width = self.files.dit_header().config.text_dim
        if states.shape[1] != width:
            raise CacheError(
                f"{path}: its states are {states.shape[1]} numbers wide, {self.files.dit_path} takes "
                f"{width}. Make the file with {TEXTS_AGAIN} --uncond_output and Qwen3-VL (32B)."
            )
        return {KEY: states, TAGS: tags}

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' states. Raises CacheError for those of another text encoder."""
        batch.check({KEY: TEXTS_AGAIN, TAGS: TEXTS_AGAIN}, "the transformer")
        config = self.files.dit_header().config
        remedy = f"{TEXTS_AGAIN} and Qwen3-VL (32B)"
        batch.check_widths({KEY: config.text_dim}, self.files.dit_path, remedy)
        if isinstance(self.options, H3TrainingOptions) and self.options.one_frame and latents.shape[2] > 1:
            raise OptionError(
                f"--one_frame: {batch.keys[0]} is a clip of {latents.shape[2]} latent frames. Leave the "
                "option out, or give tables of pictures alone"
            )
        texts = {name: batch.tensors[name] for name in (KEY, TAGS)}
        if not batch.view and self.files.task == "t2va" and TARGET_INDEX not in batch.tensors:
            return texts
        if batch.view:
            texts = dict(zip((KEY, TAGS), teacher_rows(batch), strict=True))
            batch.check_widths({teacher_key(batch.view): config.text_dim}, self.files.dit_path, remedy)
        return {**texts, **told_media(batch, self.files.task, latents), **self._shares()}

    def _shares(self) -> Conditions:
        """Return what says how clean the conditions of a training are."""
        if not isinstance(self.options, H3TrainingOptions):
            return {}
        loss = self.options.loss
        return {CLEAN: torch.tensor([loss.h3_visual_cond_clean, loss.h3_audio_cond_clean])}

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        """Predict noise - latents of pictures and sound joined, B N in float32, sample by sample.

        timesteps: B 2 of pictures and of sound. cond: states of texts and their tags, a list of n C and n.
        """
        joint = tweaks.joint
        assert joint is not None, "there is always sound"
        pictures, sounds = joint.split(noisy)
        times = (1 - timesteps.double() / 1000).tolist()
        velocities = []
        for sample, (picture_time, sound_time) in enumerate(times):
            one = slice(sample, sample + 1)
            is_shown = (cond[TAGS][sample] == 0).tolist()
            placement = self._place_conditions(cond, sample, pictures)
            picture, sound = dit(
                pictures[one],
                sounds[one],
                (picture_time, sound_time),
                send(cond[KEY][sample], noisy.device).unsqueeze(0),
                shown=is_shown if any(is_shown) else (),
                start=placement.start,
                conditions=placement.conditions,
                tweaks=tweaks,
            )
            velocities.append(-joint.join(picture, sound))
        return torch.cat(velocities)

    def _place_conditions(self, cond: Conditions, sample: int, pictures: Tensor) -> H3Placement:
        """Return keyframes and references of a sample, on the device, and where its clock starts."""
        placement = place_conditions(cond, sample, len(cond[KEY][sample]), grid_of(pictures))
        shares = clean_shares(cond)
        placed = []
        for condition in placement.conditions:
            latents = send(condition.latents, pictures.device)
            clean = shares.sound if condition.is_sound else shares.visual
            placed.append(replace(condition, latents=latents, clean=clean))
        return replace(placement, conditions=tuple(placed))

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Settle a request.

        Raises OptionError for sizes and lengths that the model does not make, and solvers with one schedule.
        """
        self.files.check(("dit",))
        request = keep_usable_media(request, NO_MEDIA, f"{NAME} makes clips of texts")
        width, height, frames = size_of(request, self.defaults)
        self._check_frames(frames)
        check_size((width, height, frames), self.latent)
        if request.solver not in (None, SOLVER):
            raise OptionError(
                "--sample_solver: pictures and sound of MiniMax-H3 have a schedule each, which only vanilla "
                "(Euler) follows. Leave it out"
            )
        if request.fps not in (None, FPS) and frames > 1:
            logger.warning(
                "--fps %g: %s makes %g frames a second, and the sound keeps their pace",
                request.fps,
                NAME,
                FPS,
            )
        flow_shift = request.flow_shift or self.noise.base_shift
        prepared = settle(
            request,
            self.defaults,
            size=(width, height, frames),
            flow_shift=flow_shift,
            usual_negative=None,
        )
        _, *picture = self.latent.shape(frames, height, width)
        channels, length, rows, columns = picture
        return replace(
            prepared,
            prompts={0: _with_line_breaks(prepared)},
            joint=Joint((channels, length, rows, columns), self.sound.shape(frames, FPS)),
            sound_shift=_shift_of_sound(request, self.noise) / flow_shift,
        )

    def _check_frames(self, frames: int) -> None:
        """Raise OptionError if the model does not make so many frames."""
        if frames == 1:
            return
        clip = self.latent.clip
        if frames % clip != LAST_FRAMES:
            lower = max((frames - LAST_FRAMES) // clip, 0) * clip + LAST_FRAMES
            raise OptionError(
                f"--video_length {frames}: {NAME} makes {clip}n + {LAST_FRAMES} frames, or one. Give {lower} "
                f"or {lower + clip}"
            )
        if not self.any_length and not LEAST_FRAMES <= frames <= MOST_FRAMES:
            raise OptionError(
                f"--video_length {frames}: {NAME} was trained with {LEAST_FRAMES} to {MOST_FRAMES} frames, 5 "
                "to 15 seconds. Give --allow_experimental_duration to make other lengths"
            )

    def needs_media(self, prepared: Prepared) -> bool:
        return False

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        return {}

    @property
    def source(self) -> rules.SourceRules:
        kinds = (rules.VIDEO, rules.IMAGE, rules.LATENTS)
        return rules.SourceRules(kinds, NAME, True, frozenset({self.name}))

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        return _encode(encoders.vae, to_pixels(frames), (seed,))

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the one section. Noise is drawn for pictures, then for tokens of sound: left, then right."""
        joint = prepared.joint
        assert joint is not None, "there is always sound"
        picture = noise.draw((1, *joint.picture))
        channels, sides, length = joint.sound
        tokens = noise.draw((sides * length, channels))
        sound = tokens.mT.unflatten(1, (sides, length)).unsqueeze(0)
        return (yield prompts[0].section(joint.join(picture, sound), inputs.get(0)))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        yield from encoders.vae.decode(latents)


def _encode(vae: H3VideoVae, pixels: Tensor, owners: tuple[int | str, ...]) -> Tensor:
    """Return a sample of each posterior, normalised: B C F H W, float32.

    pixels: B 3 F H W. owners: see `posterior_generator`.
    """
    moments = vae.encode_moments(pixels)
    generators = [posterior_generator(owner) for owner in owners]
    return vae.normalise(sample_posterior(moments, generators))


def _with_line_breaks(prepared: Prepared) -> Any:
    """Return the texts of a request with a line break for each `\\n` that was typed."""
    prompts = prepared.prompts[0]
    positive = prompts.positive
    return replace(prompts, positive=replace(positive, text=positive.text.replace("\\n", "\n")))


def _shift_of_sound(request: Request, noise: NoiseSpec) -> float:
    """Return the time shift of the sound's schedule. Raises OptionError if it is not above 0."""
    shift = float(request.extra.get(SHIFT_OF_SOUND, noise.base_shift * noise.sound_shift))
    if not 0 < shift < float("inf"):
        raise OptionError(f"--h3_shift_audio {shift:g} (--fsa in a prompt line): give a number above 0")
    return shift


def family_for_training(options: H3TrainingOptions) -> MiniMaxH3:
    """Describe the family for minimax_h3_train_network.py."""
    loss = options.loss
    clean = Clean(loss.h3_visual_cond_clean, loss.h3_audio_cond_clean)
    noise = replace(
        NOISE,
        base_shift=loss.h3_shift_video,
        sound_shift=loss.h3_shift_audio / loss.h3_shift_video,
        vary_inputs=partial(noise_inputs, clean),
    )
    return MiniMaxH3(
        files_of(options, options.chosen_task),
        noise=noise,
        sound_learning=rules.SoundLearning(loss.h3_video_loss_weight, loss.sound_weight),
        any_length=options.h3_allow_experimental_sample_duration,
        options=options,
    )


def family_for_generation(options: H3GenerationOptions) -> MiniMaxH3:
    """Describe the family for minimax_h3_generate_video.py."""
    return MiniMaxH3(
        files_of(options, options.task or "t2va"), any_length=options.allow_experimental_duration
    )


_: type[Family] = MiniMaxH3
_hears: type[HearsSound] = MiniMaxH3
