"""Samples during training: the current network, run through the same loops that generation uses."""

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from blissful_tuner.guidance import warn_about_low_scales
from blissful_tuner.latent_preview import LatentPreviews, make_previews, preview_clip
from blissful_tuner.metadata import as_png_texts, as_tags, output_metadata
from blissful_tuner.options import NO_PREVIEW, PreviewOptions
from generation.denoise import OnSection, make_latents
from generation.embedding_marks import warn_about_embeddings
from generation.experts import ExpertOffloader
from generation.loaded_networks import (
    NO_ENCODERS,
    Session,
    decode_tracks,
    encode_inputs,
    needs_media,
    select_prompts,
)
from generation.prompt_lines import SOLVERS
from generation.sample_lines import (
    MODEL_SPECIFIC_OPTIONS,
    STRENGTH_KEY,
    fit_side,
    parse_sample_prompts,
    read_all,
    read_sample_file,
)
from modules.bars import Bar
from modules.command import drop_repeated_warnings
from modules.console import format_count
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.media.colors import Frame
from modules.media.layers import write_layers
from modules.media.pixels import iterate_frames
from modules.media.tracks import Track, write_wav
from modules.media.writing import write_png, write_video
from modules.option_values import to_path
from protocols.data import Conditions, LatentSpec, SamplingDefaults
from protocols.families import HIGH_NOISE
from protocols.family import Family, trains_audio
from protocols.loading import BlockSharder
from protocols.requests import Prepared, Prompts, Request, check_values
from protocols.rules import expert_at
from protocols.steps import CompletedStep, EncodedPrompts, Section, StepCallback
from training.loss import Autocast, GetDit

logger = logging.getLogger(__name__)

BIT_RATE = 8_000_000  # as in the samples of the known tuners


@dataclass(frozen=True)
class Sample:
    """One entry of the sample prompt file, with its encoded prompts and images."""

    index: int
    settings: Mapping[str, Any]  # settings of the prompt in the file
    prepared: Prepared
    is_seeded: bool  # False: a new seed is drawn each time
    # by section of the sample
    encoded_prompts: Mapping[int, EncodedPrompts]
    encoded_media: Mapping[int, Conditions]
    prompts: Mapping[int, Prompts] = field(default_factory=dict)

    @property
    def strength(self) -> float:
        """Strength of the trained LoRA in this sample; 1: as it was trained."""
        return read_strength(self.settings)


# given the entries of a prompt file, returns those to sample
ExpandEntries = Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class PromptSource:
    """The prompt file of a run's samples, and this process's share of its entries."""

    path: Path
    process_index: int = 0
    num_processes: int = 1
    is_joint: bool = False  # all processes make every sample together
    expansions: Sequence[ExpandEntries] = ()  # of features: given the entries, return those to sample
    trains_lora: bool = True  # whether what is trained has a strength (--lm)
    text: str = ""  # contents of the file when it was last read
    read_error: str = ""  # why the last attempt to read it failed; empty if it did not

    def prompt_indices(self, count: int) -> list[int]:
        """Return the indices of the prompts that this process generates, if the file has `count` prompts."""
        indices = list(range(count))
        return indices if self.is_joint else indices[self.process_index :: self.num_processes]


# given the prompts and their encodings by section, return encodings with the present text encoders
EncodeAgain = Callable[[Mapping[int, Prompts], Mapping[int, EncodedPrompts]], Mapping[int, EncodedPrompts]]


def draw_local_seed() -> int:
    """Draw a seed for this process only."""
    return secrets.randbelow(1 << 32)


@dataclass(frozen=True)
class Sampler:
    """Generate the samples assigned to this process."""

    samples: Sequence[Sample]
    source: PromptSource
    session: Session  # contains the VAE, on the CPU between uses
    folder: Path
    name: str  # --output_name
    has_metadata: bool = True  # files record their settings, as generated files do
    weights_suffix: str = ""  # addition to the name of the model in metadata, if samples use other weights
    prompts: Sequence[str] = ()  # prompts of all processes, in the order of the file
    # strengths of the trained LoRA, if not 1, by the index of the prompt
    strengths: Mapping[int, float] = field(default_factory=dict)
    previews: LatentPreviews | None = None
    # encodes texts again with the trained text encoders; None if no text encoder is trained
    encode_again: EncodeAgain | None = None
    # draws the seed of a sample that has none; processes that make it together agree on one
    draw_seed: Callable[[], int] = draw_local_seed
    writes_files: bool = True  # False: another process writes the files, and this one only helps to generate

    @property
    def first_values(self) -> dict[str, Any]:
        """Settings of the first sample for the commands on the page; empty without samples."""
        first = self.samples[0] if self.samples else None
        return (
            {} if first is None else settings_to_repeat(first.prepared, first.is_seeded, self.session.family)
        )

    def make(
        self,
        get_dit: GetDit,
        autocast: Autocast,
        step_label: str,
        check: Callable[[], None],
        show_progress: Callable[[str], None] = lambda _: None,
        at_strength: Callable[[float], AbstractContextManager[None]] | None = None,
    ) -> list[Path]:
        """Write one file for each prompt and return the paths.

        The random state of the training is neither used nor changed.

        Args:
            get_dit: Returns the network of an expert by its index, in evaluation mode and on its device.
            autocast: Opens the autocast context of a pass.
            step_label: Part of the file names: `e000001` at the end of an epoch, `000020` at a step.
            check: Called after each step; an exception that it raises ends sampling.
            show_progress: Called with the sample and its step in words.
            at_strength: Opens a context in which the trained LoRA has a strength; None if all samples have
                a strength of 1.
        """
        paths = []
        for number, sample in enumerate(self.samples, 1):
            if not sample.is_seeded:
                sample = replace(sample, prepared=replace(sample.prepared, seed=self.draw_seed()))
            strength: AbstractContextManager[None] = nullcontext()
            if sample.strength != 1 and self.source.trains_lora:
                assert at_strength is not None
                strength = at_strength(sample.strength)
            with strength:
                latents = self._denoise(
                    sample,
                    f"sample {number} of {len(self.samples)}",
                    get_dit=get_dit,
                    autocast=autocast,
                    check=check,
                    show_progress=show_progress,
                )
            if not self.writes_files:  # this process has only taken part in the computation
                continue
            seed_suffix = f"_{sample.prepared.seed}" if sample.is_seeded else ""
            date = time.strftime("%Y%m%d%H%M%S")
            stem = f"{self.name}_{step_label}_{sample.index:02d}_{date}{seed_suffix}"
            model = f"{self.name}_{step_label}{self.weights_suffix}"
            if sample.index in self.strengths:
                model += f" at strength {sample.strength:g}"
            path = self._write(latents, sample.prepared, stem, model)
            logger.info("Sample %s", path)
            paths.append(path)
        return paths

    def _denoise(
        self,
        sample: Sample,
        title: str,
        *,
        get_dit: GetDit,
        autocast: Autocast,
        check: Callable[[], None],
        show_progress: Callable[[str], None],
    ) -> torch.Tensor:
        """Return the latents of a sample."""
        experts, prepared = self.session.family.experts, sample.prepared
        encoded_prompts = sample.encoded_prompts
        if self.encode_again is not None:  # text encoders are trained, so their outputs have changed
            with autocast():
                encoded_prompts = self.encode_again(sample.prompts, encoded_prompts)
        with (
            preview_clip(self.previews, prepared.fps) as (watchers, preview_section),
            _show_steps(
                title, prepared, check=check, show_progress=show_progress, preview_section=preview_section
            ) as (
                on_step,
                on_section,
            ),
            autocast(),
        ):
            return make_latents(
                self.session.family,
                lambda timestep: get_dit(expert_at(timestep, experts)),
                prepared,
                encoded_prompts,
                inputs=sample.encoded_media,
                device=self.session.device,
                watchers=[on_step, *watchers],
                on_section=on_section,
            )

    @torch.no_grad()
    def _write(self, latents: torch.Tensor, prepared: Prepared, stem: str, model: str) -> Path:
        """Decode a sample and write it as an image, video, image layers or audio; return the file's path."""
        # latents: Latents in model space, B C F H W, or B N together with audio.
        family = self.session.family
        track: Track | None = None  # the audio, if the model generates any
        if prepared.audio_video_shapes is not None:
            latents, audio = prepared.audio_video_shapes.split(latents)
            assert trains_audio(family)
            (track,) = decode_tracks(family, {stem: audio}, self.session.device, nullcontext).values()
        with self.session.media(with_image_encoder=False, needed_again=True) as encoders:
            pixels = family.decode(encoders, latents)
            if prepared.visible_region is not None:
                pixels = map(prepared.visible_region.of, pixels)
            metadata = self._make_metadata(prepared, model)
            is_audio_alone = latents.shape[2] == 0
            if is_audio_alone and track is not None:
                path = self.folder / f"{stem}.wav"
                write_wav(path, track, metadata)
                return path
            # decoding continues while the frames are written
            return self._write_frames(iterate_frames(pixels), prepared, stem, metadata=metadata, track=track)

    def _write_frames(
        self,
        frames: Iterator[Frame],
        prepared: Prepared,
        stem: str,
        *,
        metadata: Mapping[str, str],
        track: Track | None,
    ) -> Path:
        """Write the frames of a sample as image layers, as one image, or as a video with a track of audio."""
        latent = self.session.family.latent
        if latent.has_layers:
            return write_layers(self.folder, stem, frames, latent.has_full, as_png_texts(metadata))[-1]
        if prepared.frames == 1:
            number = "" if latent.is_image_only else "_000"  # a single image of a video model
            path = self.folder / f"{stem}{number}.png"
            write_png(path, next(frames), as_png_texts(metadata))
            return path
        path = self.folder / f"{stem}.mp4"
        tags = as_tags(metadata)
        write_video(path, frames, prepared.fps, bit_rate=BIT_RATE, tags=tags, track=track)
        return path

    def _make_metadata(self, prepared: Prepared, model: str) -> Mapping[str, str]:
        """Return the metadata of a sample made with the weights `model`; empty if the files get none."""
        if not self.has_metadata:
            return {}
        family = self.session.family
        return output_metadata(
            prepared,
            family.metadata,
            settings={"sampled_from": model},
            device=self.session.device.type,
            experts=family.experts,
        )


@contextmanager
def _show_steps(
    title: str,
    prepared: Prepared,
    *,
    check: Callable[[], None],
    show_progress: Callable[[str], None],
    preview_section: OnSection,
) -> Iterator[tuple[StepCallback, OnSection]]:
    """Yield callbacks for steps and sections that show the progress of a sample on a bar."""
    bars: list[Bar] = []
    with ExitStack() as stack:

        def on_section(section: Section) -> None:
            """Replace the progress bar by one for the denoising steps of the next section of the sample."""
            preview_section(section)
            stack.close()  # closes the bar of the previous section
            name = ", ".join(filter(None, (title, section.label)))
            # a section's own solver knows its number of steps, else its stage does
            stage = prepared.stages[section.stage] if prepared.stages else prepared
            num_steps = stage.num_steps if section.solver is None else section.solver.schedule.num_steps
            bars.append(stack.enter_context(Bar(num_steps, name)))

        def on_step(_: CompletedStep) -> bool:
            """Advance the progress bar; return False, because no preview image is needed."""
            bars[-1].update()
            show_progress(bars[-1].line())
            check()
            return False

        yield on_step, on_section


def prepare_samples(
    family: Family,
    source: PromptSource,
    folder: Path,
    name: str,
    device: torch.device,
    has_metadata: bool = True,
    weights_suffix: str = "",
    preview: PreviewOptions = NO_PREVIEW,
    block_sharder: BlockSharder | None = None,
) -> Sampler:
    """Read and check the prompts, and encode this process's share of prompts and images.

    Call it before the DiT is loaded, because the text encoders need the memory. The first process also warns
    about unused settings, removes unfinished files of an earlier run, and makes the previews.

    Args:
        family: The model family.
        source: The prompt file, which is read, and this process's share of it. If all processes generate
            every sample together, the first one writes it, and `block_sharder` splits the text encoders too.
        folder: Folder for the samples.
        name: Name of the run.
        device: Device of the run.
        has_metadata: Whether files of samples get metadata.
        weights_suffix: Addition to the model's name in metadata, if samples use other weights or LoRAs.
        preview: Options of previews.
        block_sharder: Splits blocks over processes; None keeps them complete.

    Raises:
        OptionError: If a model file that samples need is missing, or if a prompt cannot be used.
        CheckpointError: If a model file cannot be used.
    """
    source = replace(source, text=read_sample_file(source.path))
    is_first = source.process_index == 0
    entries, all_prepared = parse_requests(family, source.text, source.path, source.expansions)
    if is_first:
        warn_about_unused_keys(entries, family, source.path, source.trains_lora)
        _remove_unfinished(folder, name)
    session = Session(
        family, device, ExpertOffloader(family.experts, device, _refuse_dit), blocks=block_sharder
    )
    requests = {index: all_prepared[index] for index in source.prompt_indices(len(entries))}
    writes = not source.is_joint or is_first
    # the process that decodes samples loads the VAE now, so that a wrong file is found before the training
    samples = encode_samples(session, entries, requests, decodes=writes, loads_media=writes)
    previews = None
    if is_first:  # all processes share one preview file
        previews = make_previews(
            preview, family.latent, folder=folder, device=device, has_room=session.dits.can_stay
        )
    return Sampler(
        samples,
        source,
        session,
        folder,
        name,
        has_metadata=has_metadata,
        weights_suffix=weights_suffix,
        prompts=list_prompts(entries),
        strengths=list_strengths(entries) if source.trains_lora else {},
        previews=previews,
        draw_seed=draw_together if source.is_joint else draw_local_seed,
        writes_files=writes,
    )


def list_prompts(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the prompt of each entry; an entry without one has an empty prompt."""
    return [str(entry.get("prompt", "")) for entry in entries]


def read_strength(entry: Mapping[str, Any]) -> float:
    """Return the strength of the trained LoRA in the sample of an entry, 1 by default."""
    strength = entry.get(STRENGTH_KEY)
    return 1.0 if strength is None else float(strength)


def list_strengths(entries: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the strengths of the trained LoRA other than 1, by the index of the entry."""
    strengths = {index: read_strength(entry) for index, entry in enumerate(entries)}
    return {index: strength for index, strength in strengths.items() if strength != 1}


def encode_samples(
    session: Session,
    entries: Sequence[Mapping[str, Any]],
    requests: Mapping[int, Prepared],
    decodes: bool,
    loads_media: bool = False,
) -> list[Sample]:
    """Encode the prompts and images of samples; return the samples in the order of `requests`.

    A text encoder is loaded only if a text is not in the session's cache.

    Args:
        session: Networks of the generation.
        entries: Entries of the prompt file.
        requests: Requests by the index of their entry.
        decodes: Whether this process decodes samples.
        loads_media: Whether to load the VAE even if no sample has an image.
    """
    prompts = [select_prompts(prepared) for prepared in requests.values()]
    encoded_prompts = session.encode_texts(prompts)
    encoded_media = _encode_media(session, [*requests.values()], decodes=decodes, loads=loads_media)
    samples: list[Sample] = []
    for position, (entry_index, prepared) in enumerate(requests.items()):
        sample = Sample(
            entry_index,
            entries[entry_index],
            prepared,
            is_seeded=entries[entry_index].get("seed") is not None,
            encoded_prompts=encoded_prompts[position],
            encoded_media=encoded_media[position],
            prompts=prompts[position],
        )
        samples.append(sample)
    return samples


def _encode_media(
    session: Session, requests: Sequence[Prepared], decodes: bool, loads: bool
) -> list[Mapping[int, Conditions]]:
    """Encode the input images of each sample, and return the conditions of each."""
    # The VAE is loaded if a sample has images or `loads` is set. `decodes` says that it is needed again
    # later.
    family, encoders = session.family, NO_ENCODERS
    with ExitStack() as stack:
        if (loads and requests) or any(needs_media(family, request) for request in requests):
            encoders = stack.enter_context(session.media(with_image_encoder=True, needed_again=decodes))
        inputs = [encode_inputs(family, encoders, request) for request in requests]
    session.drop_image_encoder()
    return inputs


def warn_about_unused_keys(
    entries: Sequence[Mapping[str, Any]], family: Family, prompt_file: Path, trains_lora: bool = True
) -> None:
    """Warn about settings in the prompt file that the model, or what is trained, does not use."""
    keys = {key for entry in entries for key, value in entry.items() if value is not None}
    if STRENGTH_KEY in keys and not trains_lora:
        logger.warning(
            "%s: the strength of the LoRA (--lm) is ignored because this run trains no LoRA", prompt_file
        )
    if "discrete_flow_shift" in keys and family.defaults.flow_shift is None:
        logger.warning(
            "%s: the flow shift (--fs) is ignored because this model computes it from the size", prompt_file
        )
    if "guidance_scale" in keys and family.defaults.embedded_guidance is None:
        logger.warning(
            "%s: the embedded guidance (--g) is ignored because this model has none; --l guides it",
            prompt_file,
        )
    ignored_keys = keys - {*family.defaults.extras}
    for option, setting in MODEL_SPECIFIC_OPTIONS.items():
        if setting.key in ignored_keys:
            ignored_keys.remove(setting.key)  # some keys have two options; the first one is named
            logger.warning(
                "%s: %s (--%s) is ignored because this model has no such setting",
                prompt_file,
                setting.key,
                option,
            )


def _remove_unfinished(folder: Path, name: str) -> None:
    pattern = re.compile(rf"\.{re.escape(name)}_e?\d{{6,}}_\d{{2,}}_\d{{14}}.*\.tmp")
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def draw_together() -> int:
    """Return a seed drawn by the first process; all processes must call this."""
    (seed,) = broadcast_object_list([secrets.randbelow(1 << 32)])
    return int(seed)


def read_requests(family: Family, prompt_file: Path) -> tuple[Sequence[Mapping[str, Any]], list[Prepared]]:
    """Return the entries of a prompt file and a request for each. Raises OptionError if one is invalid."""
    return parse_requests(family, read_sample_file(prompt_file), prompt_file)


def parse_requests(
    family: Family, text: str, prompt_file: Path, expansions: Sequence[ExpandEntries] = ()
) -> tuple[Sequence[Mapping[str, Any]], list[Prepared]]:
    """Return the entries of a prompt file, given as text, and the request for each.

    Args:
        family: The model family.
        text: Text of the file.
        prompt_file: Path of the file; its suffix determines the format.
        expansions: Functions of features, each of which replaces the entries.

    Raises:
        OptionError: If a model file that samples need is missing, or if prompts cannot be read or generated,
            such as one without an image for an image-to-video model; the message lists all of them.
    """
    entries: Sequence[Mapping[str, Any]] = parse_sample_prompts(text, prompt_file)
    for expand in expansions:
        entries = expand(entries)
    try:
        family.check_files(media=True)
    except OptionError as error:
        raise OptionError(
            f"{error}; the samples of --sample_prompts need it. Pass it, or omit --sample_prompts"
        ) from None
    with drop_repeated_warnings():
        return entries, read_all(enumerate(entries, 1), partial(_prepare_entry, family, prompt_file))


def _prepare_entry(
    family: Family, prompt_file: Path, numbered_entry: tuple[int, Mapping[str, Any]]
) -> Prepared:
    """Prepare the request of a prompt file entry, given with its number; warn about unusual values."""
    number, entry = numbered_entry
    try:
        request = sample_request(entry, family)
        warn_about_embeddings(family, request)
        prepared = family.prepare(request)
        warn_about_low_scales(prepared)
    except (OptionError, ValueError, TypeError) as error:  # ValueError, TypeError: text instead of a number
        prompt = shorten(str(entry.get("prompt", "")), 100)
        raise OptionError(f"{prompt_file}, prompt {number} ({prompt!r}): {error}") from None
    return prepared


def sample_request(entry: Mapping[str, Any], family: Family) -> Request:
    """Convert an entry of a prompt file (values by key, such as `cfg_scale`) into a request.

    Missing values get the defaults of generation. Sizes are rounded down to sizes that the model supports.

    Raises:
        OptionError: For numbers that no model accepts.
    """
    default = family.defaults
    values = {key: value for key, value in entry.items() if value is not None}
    # in prompt files `cfg_scale` is the guidance scale, and `guidance_scale` is the embedded guidance
    guidance_scale = _read_number(values, "cfg_scale")
    expert_guidance = {}
    if guidance_scale is not None:
        expert_guidance = {expert.name: guidance_scale for expert in family.experts if expert.name}
    size = _read_size(values, default)
    width, height, frames = size
    # An entry's settings that only some models have, as `Request.extra` takes them.
    keys = [setting.key for setting in MODEL_SPECIFIC_OPTIONS.values()]
    request = Request(
        prompt=str(values.get("prompt", "")),
        seed=int(values.get("seed", 0)),
        width=width,
        height=height,
        frames=frames,
        steps=values.get("sample_steps"),
        guidance_scale=guidance_scale,
        expert_guidance=expert_guidance,
        embedded_guidance=_read_number(values, "guidance_scale"),
        flow_shift=None if default.flow_shift is None else _read_number(values, "discrete_flow_shift"),
        solver=_select_solver(values, default.solvers),
        fps=_read_number(values, "fps"),
        negative_prompt=values.get("negative_prompt"),
        second_prompt=values.get("prompt_2") or None,
        cfg_schedule=values.get("cfg_schedule") or None,
        image_path=_read_path(values, "image_path"),
        end_image_path=_read_path(values, "end_image_path"),
        control_path=_read_path(values, "control_video_path"),
        control_images=_read_control_images(values),
        extra=({key: _as_text(values[key]) for key in keys if key in values}),
    )
    check_values(request)
    return _with_fitted_size(request, size, family.latent)


def _read_control_images(values: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the paths of an entry's reference images, which it gives as one text or as a list."""
    paths = values.get("control_image_path") or []
    if isinstance(paths, str):
        paths = [paths]
    return tuple(to_path("control_image_path", str(path)) for path in paths)


def _read_size(values: Mapping[str, Any], default: SamplingDefaults) -> tuple[int | None, int | None, int]:
    """Return width, height and number of frames; None for a side that an image of the entry decides."""
    width: int | None = default.width
    height: int | None = default.height
    has_images = bool(values.get("control_image_path") or values.get("image_path"))
    if default.sized_by_images and has_images:
        width = height = None
    if "width" in values:
        width = int(values["width"])
    if "height" in values:
        height = int(values["height"])
    return width, height, int(values.get("frame_count", default.frames))


def _read_path(values: Mapping[str, Any], key: str) -> Path | None:
    return to_path(key, str(values[key])) if values.get(key) else None


def _read_number(values: Mapping[str, Any], key: str) -> float | None:
    return float(values[key]) if key in values else None


def _as_text(value: Any) -> str:
    """Return a prompt setting as text for `Request.extra`, with the values of a list on separate lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_fitted_size(
    request: Request, size: tuple[int | None, int | None, int], latent: LatentSpec
) -> Request:
    """Return a request whose size is rounded down to one that the model supports; warn if it differs."""
    width, height, frames = size
    multiple = latent.pixel_step
    fitted_width = None if width is None else fit_side(width, multiple)
    fitted_height = None if height is None else fit_side(height, multiple)
    fitted_frames = 1 if latent.is_image_only else latent.lengths.fit(frames)
    if latent.has_layers:
        fitted_frames = frames  # --f is the number of layers here, and any number is valid
    warnings = []
    if (fitted_width, fitted_height) != (width, height):
        pixels = f"{width} x {height} pixels (--w, --h) are changed to {fitted_width} x {fitted_height}"
        warnings.append(f"{pixels}: sides are multiples of {multiple}")
    if fitted_frames != frames:
        reason = "an image has one frame" if latent.is_image_only else f"lengths are {latent.lengths} frames"
        warnings.append(f"{format_count(frames, 'frame')} (--f) changed to {fitted_frames}: {reason}")
    if warnings:
        logger.warning("the sample %r: %s", request.prompt, "; ".join(warnings))
    return replace(request, width=fitted_width, height=fitted_height, frames=fitted_frames)


def _select_solver(values: Mapping[str, Any], supported: Sequence[str] = ()) -> str | None:
    """Return the solver that a prompt names, possibly by an alias. Warn and return None for unknown names."""
    name = values.get("sample_sampler")
    if name is None:
        return None
    solver_by_alias = _solvers_by_alias(supported)
    is_solver = name in solver_by_alias.values()
    solver = name if is_solver else solver_by_alias.get(name)
    if solver is None:
        # each name once
        known_names = ", ".join(dict.fromkeys((*solver_by_alias.values(), *solver_by_alias)))
        logger.warning(
            "the sample %r: the sampler %s (--ss) is ignored. Known: %s", values["prompt"], name, known_names
        )
    return solver


def _solvers_by_alias(supported: Sequence[str]) -> Mapping[str, str]:
    """Map each accepted sampler name to its solver; `supported` lists solvers specific to the model."""
    return {name: name for name in supported} if supported else SOLVERS


def _refuse_dit(expert: int) -> nn.Module:
    """Raise AssertionError: samples use the trained transformer, so sampling must never load one."""
    raise AssertionError("training samples use the network that is being trained")


def settings_to_repeat(prepared: Prepared, is_seeded: bool, family: Family) -> dict[str, Any]:
    """Return the settings of a sample by field name of `Request`, for a command that generates it again."""
    request = prepared.request
    values = vars(request) | {
        name: getattr(prepared, name) for name in ("frames", "steps", "embedded_guidance")
    }
    scales = prepared.guidance_scale
    # separate scales of image and audio, or of the last steps, would be replaced by a shared one, so only one
    # that the prompt line sets is repeated
    has_separate_scales = bool(prepared.rules.streams or prepared.rules.final_steps)
    if not has_separate_scales:
        values["guidance_scale"] = scales[0]
    for expert, scale in zip(family.experts, scales, strict=True):
        if expert.name == HIGH_NOISE:
            values[f"guidance_scale_{HIGH_NOISE}"] = scale
    values["seed"] = prepared.seed if is_seeded else None
    values["flow_shift"] = prepared.flow_shift if family.defaults.flow_shift is not None else None
    # the name that prompt lines use
    solvers = _solvers_by_alias(family.defaults.solvers)
    values["solver"] = next((name for name, solver in solvers.items() if solver == request.solver), None)
    return values
