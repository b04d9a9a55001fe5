"""The text encoder of MiniMax-H3 for caching captions: its tasks, and the texts of teachers.

A caption is encoded with the media of the task, and once more in the teacher's form for trainings that match
a teacher (--teacher_conditions). If the teacher gets the clip itself or images of its subject, the caption
has the format that the model was trained on for references: parts that state what each reference is, what to
keep of it, and what the clip shows. Source of the names of these parts: the released prompts.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder
from minimax_h3.cache_marks import KEY, TAGS, TEACHER_KEYS, check_cache_metadata, make_cache_metadata
from minimax_h3.cached_references import ReferenceSizes, make_reference
from minimax_h3.configs import LATENT
from minimax_h3.files import BLANK, H3_USE, H3Files, H3TextEncoder
from minimax_h3.options import H3TextCachingOptions
from minimax_h3.presentation import IMAGE, PresentedMedium, present_clip, present_image, present_keyframes
from minimax_h3.reference_options import IMAGE_EDGE, VIDEO_EDGE
from minimax_h3.references import H3Sources
from modules.devices import dtype_name
from modules.errors import MediaError, UserError
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.requests import Prompt
from protocols.rules import ReferenceMedium

FIRST_LAST, CLIP, SUBJECT = TEACHER_KEYS  # values of --teacher_conditions
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}  # values of --text_cache_dtype
KEYFRAMES, REFERENCES = "fl2va", "ref2va"  # tasks whose text encoder sees media
_COPIED = """subject_definitions:
<Video 1> is the source video.
<Audio 1> is the sound of <Video 1>.

summary:
[video editing + audio reuse] The target video is <Video 1> without any change, with its sound.

retention_analysis:
<Video 1> (all shots): fully_preserved - all subjects, actions, shots and camera movements stay as they are.
<Audio 1>: fully_copy - <Audio 1> is the whole sound of the target video.

detailed_description:
"""


def describe_copy(caption: str) -> str:
    """Return a caption for a teacher that has the clip and its audio as references to copy."""
    return _COPIED + caption


def describe_subjects(caption: str, num_subjects: int, is_still: bool) -> str:
    """Rewrite a caption for a teacher model that copies only the subjects' looks from images.

    Each of the `num_subjects` subjects has one image. `is_still` is true if the item is an image.
    """
    numbers = range(1, num_subjects + 1)
    subjects = " and ".join(f"<Subject {number}>" for number in numbers)
    target = "a still image" if is_still else "a video"
    definitions = "\n".join(
        f"<Subject {number}> has the looks of the subject in <Picture {number}>." for number in numbers
    )
    retention = "\n".join(
        f"<Subject {number}> (appears in [Shot 1]): attribute_transfer - the face and hair of "
        f"<Picture {number}> are taken; clothes, pose, framing and place are those of the description."
        for number in numbers
    )
    return (
        f"subject_definitions:\n{definitions}\n\n"
        f"summary:\n[reference generation] The target is {target} of {subjects}, as described.\n\n"
        f"retention_analysis:\n{retention}\n\n"
        f"detailed_description:\n{caption}"
    )


class H3CachingEncoder(H3TextEncoder):
    """Text encoder that caches states for one task; set its fields before use."""

    task = "t2va"
    # value of --teacher_conditions: what a teacher's additional states are encoded with; None without
    teacher_conditions: str | None = None
    states_dtype: torch.dtype | None = None  # dtype of stored states; None for the compute dtype
    short_edges = IMAGE_EDGE, VIDEO_EDGE  # short sides of references: images, clips

    @property
    def abilities(self) -> EncoderAbilities:  # type: ignore[override]  # depends on the task
        """Abilities, which depend on the task: whether the encoder sees the clip and references."""
        # for references, the length of the clip matters too
        sees_clip = self.task != "t2va" or self.teacher_conditions is not None
        sees_media = self.task == REFERENCES or self.teacher_conditions == SUBJECT
        return replace(
            H3TextEncoder.abilities,
            writes_cache_metadata=True,
            encodes_clip=sees_clip,
            encodes_media=sees_media,
        )

    @property
    def identity(self) -> Mapping[str, str]:
        """Return what the text states depend on besides the text: the task and the sizes of references."""
        info = {
            "task": self.task,
            "teacher": self.teacher_conditions,
            "blank": repr(self.settings.empty_prompt_text),
        }
        info["stored"] = None if self.states_dtype is None else dtype_name(self.states_dtype)
        info["reference_edges"] = (
            " ".join(map(str, self.short_edges)) if self.abilities.encodes_media else None
        )
        named = {f"{self.name}_{fact}": value for fact, value in info.items() if value is not None}
        return {**super().identity, **named}

    def set_task(self, task: str, teacher_conditions: str | None, states_dtype: torch.dtype | None) -> None:
        """Set the task, the teacher whose text states are cached too, and the dtype of cached states."""
        self.task = task
        self.teacher_conditions = teacher_conditions
        self.states_dtype = states_dtype
        rows = () if teacher_conditions is None else TEACHER_KEYS[teacher_conditions]
        self.keys = self.settings.keys | set(rows)
        self.variable_length = self.variable_length | set(rows)

    def cache_metadata(self, caption: str, shown: Sequence[str]) -> Mapping[str, str]:
        """Return a text cache's metadata: task, format, teacher, and a checksum of caption and media."""
        return make_cache_metadata(self.task, self.teacher_conditions, caption, shown)

    def check_metadata(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Raise CacheError if a cache was made for another task."""
        check_cache_metadata(path, metadata, self.task)

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return each prompt's states, with the task's media before it, and those that a teacher needs.

        The empty prompt is encoded without either. Raises MediaError if a media file cannot be read.
        """
        return [self._encode_item(prompt) for prompt in prompts]

    def _encode_item(self, prompt: Prompt) -> Conditions:
        (conditions,) = super().encode([replace(prompt, media_before_text=self._present(prompt))])
        if self.teacher_conditions is not None and prompt.clip is not None:
            (teacher_encoding,) = super().encode([self._make_teacher_prompt(prompt, prompt.clip)])
            rows = TEACHER_KEYS[self.teacher_conditions]
            conditions = {**conditions, rows.states: teacher_encoding[KEY], rows.tags: teacher_encoding[TAGS]}
        return {key: [self._cast_states(rows) for rows in value] for key, value in conditions.items()}

    def _cast_states(self, rows: Tensor) -> Tensor:
        dtype = self.states_dtype
        return rows if dtype is None or not rows.is_floating_point() else rows.to(dtype)

    def _present(self, prompt: Prompt) -> tuple[PresentedMedium, ...]:
        """Return the images, clips and audio that are presented to the text encoder before a caption."""
        if prompt.clip is None:
            return ()  # not a caption of a dataset
        if self.task == KEYFRAMES:
            return present_keyframes(_list_keyframes(prompt))
        if self.task != REFERENCES:
            return ()
        if not prompt.media:
            raise MediaError(
                "its row has no references, which --task ref2va requires. Name them in `references`, or "
                "move it to a separate list, for --task t2va."
            )
        return self._present_references(prompt.media, len(prompt.clip))

    def _present_references(
        self, media: Sequence[ReferenceMedium], frames: int
    ) -> tuple[PresentedMedium, ...]:
        """Return the references of a dataset row as they are presented for a clip of `frames` frames."""
        sizes = ReferenceSizes(*self.short_edges, LATENT.pixel_step)
        references = [make_reference(medium) for medium in media]
        try:
            sources = tuple(sizes.get_reference_source(reference, frames) for reference in references)
        except UserError as error:
            raise MediaError(str(error)) from error
        return H3Sources(references=sources).presented_media(references)

    def _make_teacher_prompt(self, prompt: Prompt, clip: Tensor) -> Prompt:
        """Return the prompt for the teacher, with the text and media that --teacher_conditions selects."""
        if self.teacher_conditions == FIRST_LAST:
            return replace(prompt, media_before_text=present_keyframes(_list_keyframes(prompt)))
        if self.teacher_conditions == CLIP:
            presented = present_clip(clip[..., :3], has_audio=True)
            return replace(prompt, text=describe_copy(prompt.text), media_before_text=(presented,))
        images = tuple(present_image(frame[..., :3]) for frame in prompt.image_pixels)
        images += self._present_references(prompt.media, len(clip))
        if not images or any(image.kind != IMAGE for image in images):
            raise MediaError(
                "--teacher_conditions subject_ref shows the teacher images of the subject and nothing else. "
                "Give the table control_directory, or name images in `references` of its rows."
            )
        # a separate caption for the teacher, if the dataset has one
        text = prompt.text_with_references
        if text is None:
            text = describe_subjects(prompt.text, len(images), is_still=len(clip) == 1)
        return replace(prompt, text=text, media_before_text=images)


def _list_keyframes(prompt: Prompt) -> list[Tensor]:
    """Return the first and the last frame of a clip; for an image, its control images."""
    clip = prompt.clip
    assert clip is not None, "the empty prompt shows nothing"
    if len(clip) > 1:
        return [clip[0][..., :3], clip[-1][..., :3]]
    if not prompt.image_pixels:
        raise MediaError(
            "a single image has no first and last frame, and its table has no control images. "
            "Give the table control_directory, or cache it with --task t2va."
        )
    # the control images of a still image
    return [frame[..., :3] for frame in prompt.image_pixels]


@functools.cache  # cached, because uses are compared by identity
def _make_settings(blank: str) -> LanguageEncoderSettings:
    """Return how the text encoder is used, with `blank` in place of an empty prompt."""
    return H3_USE if blank == BLANK else replace(H3_USE, empty_prompt_text=blank)


@dataclass(frozen=True)
class H3CachingFiles(H3Files):
    """Files of a run that caches texts."""

    teacher_conditions: str | None = None
    states_dtype: torch.dtype | None = None  # dtype of cached states; None for the text encoder's
    blank: str = BLANK  # replaces the empty prompt
    short_edges: tuple[int, int] = (IMAGE_EDGE, VIDEO_EDGE)

    encoder_class = H3CachingEncoder

    @property
    def encoder_settings(self) -> LanguageEncoderSettings:  # type: ignore[override]
        """Return how the text encoder is used, including the text of the empty prompt."""
        return _make_settings(self.blank)

    def language_model(self) -> LanguageModelEncoder:
        """Return the text encoder, set up for the task."""
        encoder = super().language_model()
        assert isinstance(encoder, H3CachingEncoder)
        encoder.set_task(self.task, self.teacher_conditions, self.states_dtype)
        encoder.short_edges = self.short_edges
        return encoder

    def check_texts(self, config: object, needed: bool) -> None:
        """Check the text encoder, and also its vision tower if captions come with media."""
        super().check_texts(config, needed)
        if self.language_model().abilities.encodes_clip:
            self.check_tower()


def make_text_caching_files(options: H3TextCachingOptions) -> H3CachingFiles:
    """Return the files of a run that caches texts."""
    dtype = options.text_cache_dtype
    files = H3CachingFiles(
        task=options.task or "t2va",
        teacher_conditions=options.teacher_conditions,
        states_dtype=None if dtype is None else DTYPES[dtype],
        blank=options.uncond_text,
        short_edges=(options.reference_image_short_edge, options.reference_video_short_edge),
    )
    return files.add_text(options.text)
