"""A dataset table: one `[[datasets]]` entry in our layout, or one subset in the layout of sd-scripts.

Standard library only.
"""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from dataset import config_keys as forms
from dataset.config_keys import (
    FRAMES,
    LATENTS,
    LEARNING,
    NOTHING,
    REFERENCES,
    SECTIONS,
    TEXTS,
    Indexed,
    Stale,
    key,
)
from dataset.subset_options import SUBSET_KEYS
from dataset.timestep_keys import HIGH, LOW, SHIFT
from protocols.rules import ReferenceMedium, ReferenceRules

Table = Mapping[str, Any]
VIDEO, IMAGE = ("video",), ("image",)
NEITHER, LATENTS_ONLY, PATH_ONLY = Indexed.NEITHER, Indexed.LATENTS_ONLY, Indexed.PATH_ONLY


@dataclass(frozen=True)
class CaptionChanges:
    """Random changes to captions during training: shuffling and dropping of parts between separators."""

    shuffle: bool = False
    separator: str = ","
    keep_tokens: int = 0  # number of leading parts that are never moved or dropped
    keep_tokens_separator: str = ""  # divides a caption into fixed, shuffled, fixed; "": not divided
    secondary_separator: str = ""  # joins parts that are shuffled as one; "": no parts are joined
    wildcards: bool = False  # captions may have {a|b}, and several lines, one of which is drawn
    dropout_every_n_epochs: int = 0  # every n-th epoch has empty captions; 0: no epoch has
    part_dropout_rate: float = 0.0
    warmup_min: int = 1  # number of parts at the first step
    # step up to which the number of parts grows; below 1: a fraction of all steps; 0: off
    warmup_step: float = 0.0
    # captions of sources are the text of the file, to which the changes and then trigger_word, caption_prefix
    # and caption_suffix are applied in each step
    varies_per_step: bool = False

    @property
    def moves_tags(self) -> bool:
        """Return whether the table shuffles or drops parts of captions."""
        return self.shuffle or self.part_dropout_rate > 0 or self.warmup_step > 0

    @property
    def varying_keys(self) -> tuple[str, ...]:
        """Return the used keys that change captions at random, so that embeddings cannot be cached.

        caption_dropout_every_n_epochs is not among them, because the embedding of the empty prompt is cached.
        """
        keys = {
            "shuffle_caption": self.shuffle,
            "enable_wildcard": self.wildcards,
            "caption_tag_dropout_rate": self.part_dropout_rate > 0,
            "token_warmup_step": self.warmup_step > 0,
        }
        return tuple(key for key, is_set in keys.items() if is_set)


@dataclass(frozen=True)
class Augmentation:
    """Image augmentations of a table."""

    flip: bool = False  # the latents of the mirrored image are cached too
    color: bool = False  # hue and gamma
    random_crop: bool = False
    face_crop_range: tuple[float, float] | None = None

    @property
    def varying_keys(self) -> tuple[str, ...]:
        """Return the used keys that change images at random, so that latents cannot be cached.

        flip_aug is not among them, because the latents of mirrored images are cached, too.
        """
        keys = {
            "color_aug": self.color,
            "random_crop": self.random_crop,
            "face_crop_aug_range": self.face_crop_range is not None,
        }
        return tuple(key for key, is_set in keys.items() if is_set)


@dataclass(frozen=True)
class BucketRule:
    """Bucket settings in the layout of sd-scripts; all sizes are in pixels."""

    minimum: int = 256
    maximum: int = 1024
    step: int = 64
    interpolation: str | None = None  # None: area when shrinking, else lanczos

    def describe(self) -> dict[str, Any]:
        """Return the settings as entries of the metadata list `ss_datasets`."""
        return {
            "min_bucket_reso": self.minimum,
            "max_bucket_reso": self.maximum,
            "bucket_reso_steps": self.step,
            "resize_interpolation": self.interpolation,
        }


PLAIN_CAPTIONS = CaptionChanges()
NO_AUGMENTATION = Augmentation()


@dataclass(frozen=True)
class Guide:
    """A folder with one guide image for each clip of a table."""

    directory: Path
    index: int  # index of a frame (-1: right before the first), or of the latent frame that is replaced
    strength: float  # above 0, up to 1 (no noise is added)
    is_keyframe: bool = True  # an additional frame; False: replaces a latent frame of the clip


class FormatKeys(Protocol):
    """The keys that only one source format has, such as tars or table files, as a frozen dataclass."""

    @property
    def source(self) -> Path:
        """The folder or file that contains the items, without passwords."""

    @property
    def folder(self) -> Path | None:
        """Default for cache_directory; None if there is none."""

    def source_key(self, kind: str) -> str:
        """Return the key that names the source in a table of this kind, such as `video_tars`."""


KeysT = TypeVar("KeysT", bound=FormatKeys)


@dataclass(frozen=True)
class Source:
    """Where the items of a table come from, with their masks, layers and audio."""

    # exactly one of `directory`, `jsonl_file` and `format_keys` is set
    directory: Path | None = forms.source_field(forms.PATH)
    jsonl_file: Path | None = forms.source_field(forms.LIST_PATH)
    format_keys: FormatKeys | None = None  # keys of the data form; None for a folder or a JSONL list
    # base folder of relative paths in a list
    image_folder: Path | None = field(default=None, metadata={"indexed": PATH_ONLY})
    # conditioning_data_dir of the file: has masks (mask_directory) or control images (control_directory)
    conditioning_directory: Path | None = field(default=None, metadata={"indexed": PATH_ONLY})
    # rows may name URLs, which are downloaded
    allow_urls: bool = key(forms.YES_NO, False, is_form_specific=True, stale=NOTHING)
    # where downloads are kept; None: in the cache directory
    download_directory: Path | None = key(forms.PATH, is_form_specific=True, stale=NOTHING, indexed=PATH_ONLY)
    mask_directory: Path | None = key(forms.PATH, is_form_specific=True, stale=LATENTS | LEARNING, rank=6)
    # the rejected items of preference pairs; the table's own items are the chosen ones
    worse_directory: Path | None = key(forms.PATH, is_form_specific=True, stale=LEARNING, rank=7)
    # transparent parts are not learned
    alpha_mask: bool = key(forms.YES_NO, False, stale=LATENTS | LEARNING, rank=4)
    # for models with audio: whether clips need audio, and the folder of separate audio files
    audio: str = key(forms.AUDIO, forms.IF_PRESENT, kinds=VIDEO, stale=LEARNING, rank=5)
    audio_directory: Path | None = key(forms.PATH, kinds=VIDEO, is_form_specific=True, stale=LEARNING, rank=6)
    # audio_directory is from an option of the caching command, which training does not have
    audio_from_option: bool = False
    # audio may be in files named like the clips, next to them
    finds_audio_by_name: bool = field(default=False, metadata={"indexed": LATENTS_ONLY})
    is_audio_only: bool = False  # items are audio files; clips get black frames
    # images are learned with their layers: cat_1.png, cat_2.png, ... of cat.png
    multiple_target: bool = key(
        forms.YES_NO, False, kinds=IMAGE, is_form_specific=True, stale=LATENTS | LEARNING, rank=8
    )
    has_precomputed_latents: bool = False  # latents are precomputed; no frames are read
    excludes_animations: bool = False  # a video table has the same folder and uses its animations

    @property
    def path(self) -> Path:
        """Return the folder or list from which the table reads its items; the first of several."""
        path = self.directory or self.jsonl_file
        if path is None:
            assert self.format_keys is not None
            path = self.format_keys.source
        return path

    @property
    def base_folder(self) -> Path:
        """Folder to which the paths of a table's images are relative."""
        return self.directory or self.image_folder or self.path.parent

    def require_format_keys(self, kind: type[KeysT]) -> KeysT:
        """Return the values of the keys that only this table's data format has; `kind` is their class."""
        assert isinstance(self.format_keys, kind)
        return self.format_keys


@dataclass(frozen=True)
class Buckets:
    """Sizes and lengths in which a table's items are cached, and which frames of a clip are used."""

    resolution: tuple[int, int] = key(forms.SIZE, (960, 544), in_general=True, stale=LATENTS)  # width, height
    enable_bucket: bool = key(forms.YES_NO, False, in_general=True, stale=LATENTS)
    # never without enable_bucket
    bucket_no_upscale: bool = key(forms.YES_NO, False, in_general=True, stale=LATENTS)
    rule: BucketRule | None = None  # None: buckets of video trainers
    augmentation: Augmentation = NO_AUGMENTATION
    # ascending; `with_lengths` rounds them
    target_frames: tuple[int, ...] = key(forms.COUNTS, (1,), kinds=VIDEO, stale=FRAMES, indexed=LATENTS_ONLY)
    frame_extraction: str = key(forms.MODE, "head", kinds=VIDEO, stale=FRAMES)
    frame_stride: int = key(forms.COUNT, 1, kinds=VIDEO, stale=FRAMES)
    frame_sample: int = key(forms.SAMPLES, 1, kinds=VIDEO, stale=FRAMES)
    max_frames: int = key(forms.COUNT, 129, kinds=VIDEO, stale=FRAMES)
    # AUTO: timestamps in each file
    source_fps: float | str | None = key(forms.SOURCE_FPS, kinds=VIDEO, stale=FRAMES, indexed=LATENTS_ONLY)
    # frames per second of clips in training; None: the model's
    target_fps: float | None = key(forms.TARGET_FPS, kinds=VIDEO, in_general=True, stale=FRAMES)
    fp_latent_window_size: int = key(forms.COUNT, 9, stale=SECTIONS)

    @property
    def declared_fps(self) -> float | None:
        """Return the frame rate that is stated as a number, not as "auto"."""
        return None if isinstance(self.source_fps, str) else self.source_fps


@dataclass(frozen=True)
class Captions:
    """The texts of a table's items, and how they change during training."""

    caption_extension: str | None = key(forms.EXTENSION, in_general=True, stale=NOTHING)
    # None: tries the usual names of caption columns
    caption_column: str | None = key(forms.COLUMN, is_form_specific=True, stale=NOTHING)
    # trigger_word, caption_prefix, caption_suffix: "" adds nothing
    trigger_word: str = key(forms.WORDS, "", in_general=True, stale=TEXTS | LEARNING)
    caption_prefix: str = key(forms.WORDS, "", in_general=True, stale=TEXTS | LEARNING)
    caption_suffix: str = key(forms.WORDS, "", in_general=True, stale=TEXTS | LEARNING)
    # caption of media without a caption file; None: a missing caption file is an error
    class_tokens: str | None = key(forms.WORDS, is_form_specific=True, stale=NOTHING)
    # each line of a caption file is a caption
    multi_caption: bool = key(forms.YES_NO, False, in_general=True, stale=TEXTS | LEARNING)
    caption_dropout_rate: float = key(
        forms.SHARE, 0.0, in_general=True, stale=LEARNING, rank=2, indexed=NEITHER
    )
    changes: CaptionChanges = PLAIN_CAPTIONS
    # cache the empty prompt even if no captions are dropped
    uses_empty_prompt: bool = field(default=False, metadata={"indexed": NEITHER})

    @property
    def caches_empty_prompt(self) -> bool:
        """Return whether text caches of the table include the empty prompt."""
        drops_captions = self.caption_dropout_rate != 0 or self.changes.dropout_every_n_epochs > 0
        return drops_captions or self.uses_empty_prompt


@dataclass(frozen=True)
class References:
    """What conditions the items of a table: control media, references, guides, and parts of the items."""

    # in addition to control_path and control_path_1, ...
    control_column: str | None = key(forms.COLUMN, is_form_specific=True, stale=NOTHING)
    control_directory: Path | None = key(forms.PATH, is_form_specific=True, stale=NOTHING)
    # reference media of a clip, and masks of the part of control clips that is generated. Caches are
    # compared with these files
    reference_directory: Path | None = key(forms.PATH, is_form_specific=True, stale=NOTHING)
    control_mask_directory: Path | None = key(forms.PATH, is_form_specific=True, stale=NOTHING)
    # audio on which the audio of clips is modeled, such as another recording of the same voice
    reference_audio_directory: Path | None = key(
        forms.PATH, kinds=VIDEO, is_form_specific=True, stale=LEARNING, rank=6
    )
    # parts of an item that training may use as conditions: a rectangle of each frame, and parts of the audio,
    # whose seconds are in files named like the clips
    spatial_crop_region: tuple[int, ...] | None = key(
        forms.REGION, in_general=True, stale=LEARNING, rank=9, indexed=NEITHER
    )
    audio_cond_mask_directory: Path | None = key(
        forms.PATH, kinds=VIDEO, stale=LEARNING, rank=9, indexed=NEITHER
    )
    # images that guide clips: as additional frames, or in place of a latent frame; see `guides`
    keyframe_guide_directory: Path | None = key(forms.PATH, kinds=VIDEO, is_form_specific=True, stale=NOTHING)
    keyframe_guide_frame_idx: int = key(forms.FRAME, -1, kinds=VIDEO, stale=LEARNING, rank=9, indexed=NEITHER)
    keyframe_guide_strength: float = key(
        forms.STRENGTH, 1.0, kinds=VIDEO, stale=LEARNING, rank=9, indexed=NEITHER
    )
    keyframe_guide_extra_directories: tuple[Path, ...] | None = key(
        forms.PATHS, kinds=VIDEO, is_form_specific=True, stale=NOTHING
    )
    keyframe_guide_extra_frame_idxs: tuple[int, ...] | None = key(
        forms.FRAME_INDICES, kinds=VIDEO, stale=LEARNING, rank=9, indexed=NEITHER
    )
    keyframe_guide_extra_strengths: tuple[float, ...] | None = key(
        forms.STRENGTHS, kinds=VIDEO, stale=LEARNING, rank=9, indexed=NEITHER
    )
    latent_idx_guide_directory: Path | None = key(
        forms.PATH, kinds=VIDEO, is_form_specific=True, stale=NOTHING
    )
    latent_idx_guide_frame_idx: int = key(
        forms.FROM_ZERO, 0, kinds=VIDEO, stale=LEARNING, rank=9, indexed=NEITHER
    )
    latent_idx_guide_strength: float = key(
        forms.STRENGTH, 1.0, kinds=VIDEO, stale=LEARNING, rank=9, indexed=NEITHER
    )
    has_guides: bool = False  # see `guides`
    fp_1f_clean_indices: tuple[int, ...] | None = key(forms.PLACES, kinds=IMAGE, stale=SECTIONS)
    fp_1f_target_index: int | None = key(forms.PLACE, kinds=IMAGE, stale=SECTIONS)
    fp_1f_no_post: bool = key(forms.YES_NO, False, kinds=IMAGE, stale=SECTIONS)
    # for reference images; if both are set, only larger images are resized
    no_resize_control: bool = key(forms.YES_NO, False, kinds=IMAGE, stale=REFERENCES | LEARNING, rank=1)
    # None: the image's own resolution
    control_resolution: tuple[int, int] | None = key(
        forms.SIZE, kinds=IMAGE, stale=REFERENCES | LEARNING, rank=1
    )
    # fraction of batches that are trained without references
    reference_dropout_rate: float = key(
        forms.SHARE, 0.0, kinds=IMAGE, stale=LEARNING, rank=2, indexed=LATENTS_ONLY
    )
    # how the family uses control images as references; None: control images are resized like their image
    rules: ReferenceRules | None = field(default=None, metadata={"indexed": LATENTS_ONLY})
    # how the family uses clip references and masks of control clips; None: it uses neither
    clip_rules: ReferenceRules | None = field(default=None, metadata={"indexed": LATENTS_ONLY})
    # rows of lists may have `references`
    reads_row_references: bool = field(default=False, metadata={"indexed": LATENTS_ONLY})
    reads_listed_controls: bool = True  # False: control media named in lists are ignored

    @property
    def guides(self) -> tuple[Guide, ...]:
        """The guides of a table: keyframes first, then the guide that replaces a latent frame."""
        guides = []
        if self.keyframe_guide_directory is not None:
            guides.append(
                Guide(
                    self.keyframe_guide_directory, self.keyframe_guide_frame_idx, self.keyframe_guide_strength
                )
            )
            extra = zip(
                self.keyframe_guide_extra_directories or (),
                self.keyframe_guide_extra_frame_idxs or (),
                self.keyframe_guide_extra_strengths or (),
                strict=True,
            )
            guides += [Guide(directory, index, strength) for directory, index, strength in extra]
        if self.latent_idx_guide_directory is not None:
            guides.append(
                Guide(
                    self.latent_idx_guide_directory,
                    self.latent_idx_guide_frame_idx,
                    self.latent_idx_guide_strength,
                    is_keyframe=False,
                )
            )
        return tuple(guides)

    @property
    def control_count(self) -> int | None:
        """Number of control images of an image that has any; 0 if the table reads none; None if it varies."""
        if not self.reads_listed_controls:
            return 0
        if self.rules is not None:
            return None
        return len(self.fp_1f_clean_indices) if self.fp_1f_clean_indices else 1

    @property
    def are_seen_by_texts(self) -> bool:
        """Return whether text encoders see the reference images of a caption's image."""
        return self.rules is not None and self.rules.seen_by_text

    @property
    def has_conditioned_parts(self) -> bool:
        """Return whether parts of each item are conditions and have no loss."""
        parts = (self.spatial_crop_region, self.audio_cond_mask_directory)
        return self.has_guides or any(part is not None for part in parts)


@dataclass(frozen=True)
class Learning:
    """How often and with which weight and noise levels a table's items are learned."""

    batch_size: int = key(forms.COUNT, 1, in_general=True, stale=NOTHING)
    num_repeats: int = key(forms.REPEATS, 1, in_general=True, stale=NOTHING, indexed=NEITHER)
    validation: bool = key(forms.YES_NO, False, stale=NOTHING, indexed=NEITHER)  # not trained on
    # fraction not trained on; None: the option's value
    validation_split: float | None = field(default=None, metadata={"indexed": NEITHER})
    # selects these items; None: the option's value
    validation_seed: int | None = field(default=None, metadata={"indexed": NEITHER})
    # factor on the loss of its items in training
    prior_loss_weight: float = key(forms.WEIGHT, 1.0, stale=LEARNING, rank=3, indexed=NEITHER)
    # multiplier of the LoRA while it trains on these items; for slider LoRAs
    network_multiplier: float = key(forms.MULTIPLIER, 1.0, stale=LEARNING, rank=3, indexed=NEITHER)
    # override the training options of the same names; None: the option's value
    min_timestep: int | None = key(LOW, in_general=True, stale=LEARNING, rank=7, indexed=NEITHER)
    max_timestep: int | None = key(HIGH, in_general=True, stale=LEARNING, rank=7, indexed=NEITHER)
    discrete_flow_shift: float | None = key(SHIFT, in_general=True, stale=LEARNING, rank=7, indexed=NEITHER)
    # regularization images: repeated until there are as many as other images in the group
    is_reg: bool = field(default=False, metadata={"indexed": NEITHER})
    # names of custom_attributes that are true; training targets read them
    attributes: frozenset[str] = field(default=frozenset(), metadata={"indexed": NEITHER})

    @property
    def has_own_timesteps(self) -> bool:
        """Return whether min_timestep, max_timestep or discrete_flow_shift is set."""
        settings = (self.min_timestep, self.max_timestep, self.discrete_flow_shift)
        return any(setting is not None for setting in settings)


@dataclass(frozen=True)
class DatasetTable:
    """One `[[datasets]]` table of a dataset file, with defaults for all missing keys.

    Keys for the other kind of table have defaults, too. A field made by `key` also declares allowed values.
    The names of the fields are unique among the records.
    """

    config_path: Path = field(metadata={"indexed": NEITHER})
    index: int = field(metadata={"indexed": NEITHER})  # index of the table in the file
    kind: Literal["image", "video"]
    cache_format: Literal["files", "shards", "npz"] = key(
        forms.CACHE_FORMAT, "files", in_general=True, stale=NOTHING
    )
    # None only while the file is read
    cache_directory: Path = key(forms.PATH, stale=NOTHING, indexed=PATH_ONLY)
    # --- for subsets in the layout of sd-scripts
    group: int | None = None  # index of its [[datasets]], whose subsets share batches; None: not a subset
    subset: int | None = None  # index of the subset in its [[datasets]]
    source: Source = Source()
    buckets: Buckets = Buckets()
    captions: Captions = Captions()
    references: References = References()
    learning: Learning = Learning()

    @property
    def label(self) -> str:
        """Return where the table is in the dataset file, for messages."""
        if self.group is not None and self.subset is not None:
            return f"[[datasets]] {self.group + 1}, subset {self.subset + 1}"
        return f"[[datasets]] {self.index + 1}"

    @property
    def batch_group(self) -> int:
        """Return an index that items of the same batch share; subsets of one entry have the same index."""
        return self.index if self.group is None else self.group

    @property
    def media_kind(self) -> Literal["image", "video", "sound"]:
        """Return the kind of media of the items."""
        return "sound" if self.source.is_audio_only else self.kind

    def value_of(self, name: str) -> Any:
        """Return the value of a field of the table or of one of its records, by the field's name."""
        record = getattr(self, _RECORD_BY_FIELD[name]) if name in _RECORD_BY_FIELD else self
        return getattr(record, name)

    def with_values(self, **values: Any) -> "DatasetTable":
        """Return a copy with other values of these fields, which may be fields of its records."""
        own = {}
        by_record: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name in _RECORD_BY_FIELD:
                by_record.setdefault(_RECORD_BY_FIELD[name], {})[name] = value
            else:
                own[name] = value
        for name, changes in by_record.items():
            own[name] = replace(getattr(self, name), **changes)
        return replace(self, **own)

    @property
    def name(self) -> str:
        """The table's name for messages: `data.toml, [[datasets]] 2 (clips)`."""
        return f"{self.config_path}, {self.label} ({self.source.path})"

    @property
    def source_key(self) -> str:
        """The table key that names the items' source, such as `image_directory`."""
        if self.source.format_keys is not None:
            return self.source.format_keys.source_key(self.kind)
        name = "directory" if self.source.directory is not None else "jsonl_file"
        return f"{'audio' if self.source.is_audio_only else self.kind}_{name}"

    @property
    def path_key(self) -> str:
        """Return the key of an item's path in lists, such as `video_path`."""
        return "audio_path" if self.source.is_audio_only else f"{self.kind}_path"

    @property
    def learns_edits(self) -> bool:
        """Return whether this is an image table for a model trained to edit reference images."""
        return (
            self.kind == "image" and self.references.rules is not None and self.references.rules.edits_images
        )

    def visible_reference_settings(self, bucket: Sequence[int]) -> dict[str, Any]:
        """Return, by name, the table's settings that change the reference images seen by text encoders.

        Returns {} unless text encoders see reference images at the size that the VAE encodes. `bucket` is the
        item's width and height; if it is unknown, (), the keys that decide it are returned in its place.
        """
        if self.references.rules is None or not self.references.rules.text_sees_vae_input:
            return {}
        settings: dict[str, Any] = {"bucket": list(bucket), **self.non_default_values(REFERENCES)}
        return settings if bucket else settings | self.non_default_values(LATENTS)

    def fitted_caption_settings(self) -> dict[str, Any]:
        """Return, by name, the settings of a caption whose positions were converted to the resized image."""
        return {FITTED: True, **self.non_default_values(LATENTS)}

    def visible_media_settings(
        self,
        sees_frames: bool,
        reference_media: Iterable[ReferenceMedium] | None,
        further_text: str | None = None,
    ) -> dict[str, Any]:
        """Return the table's settings that change the frames and reference media that text encoders see.

        Text caches record them as JSON, by name: embeddings are stale if a setting changes.

        Args:
            sees_frames: Whether text encoders see the frames of the clip.
            reference_media: Reference media in order; None if text encoders see none.
            further_text: Additional text of the row for the encoders, used only with `reference_media`.
        """
        settings: dict[str, Any] = {}
        if sees_frames:
            sizes = {
                "resolution": list(self.buckets.resolution),
                **self.non_default_values(FRAMES),
                **self.non_default_values(LATENTS),
            }
            settings[CLIP] = sizes
        if reference_media is not None:
            settings[MEDIA] = [[medium.kind, medium.is_silent] for medium in reference_media]
            if further_text is not None:
                settings[FURTHER_TEXT.key] = further_text
        return settings

    def non_default_values(self, stale: Stale) -> dict[str, Any]:
        """Return the keys with one of these `stale` flags that differ from their defaults, with their values.

        The flags select, for example, the keys whose change makes cached latents stale. The values are JSON
        values; a folder is reduced to its name.
        """
        defaults = get_cache_key_defaults(stale)
        values = {name: self.value_of(name) for name in defaults}
        own_keys = self.source.format_keys
        if own_keys is not None:  # keys that only tables of this data form have
            own_defaults = get_cache_key_defaults(stale, own_keys.__class__)
            values |= {name: getattr(own_keys, name) for name in own_defaults}
            defaults = defaults | own_defaults
        return {name: _as_json(value) for name, value in values.items() if value != defaults[name]}

    @property
    def family_settings(self) -> list[Any]:
        """Values of the fields that `for_family` sets, which an index records with the latent space."""
        return [
            self.source.finds_audio_by_name,
            self.references.reads_row_references,
            self.buckets.source_fps,
            self.buckets.target_frames,
            self.references.rules,
            self.references.clip_rules,
            self.references.reference_dropout_rate,
        ]

    @property
    def learning_keys(self) -> dict[str, Any]:
        """Keys that affect training and are not at their defaults, with values, for states and metadata."""
        values = self.non_default_values(LEARNING)
        if self.learning.is_reg:
            values["is_reg"] = True
        if self.learning.attributes:  # some select another target
            values["custom_attributes"] = sorted(self.learning.attributes)
        for name, subset_key in SUBSET_KEYS.items():  # random changes of captions and images
            record, _, field_name = subset_key.field.partition(".")
            if record in ("changes", "augmentation"):
                value = getattr(self.value_of(record), field_name)
                if value != subset_key.default:
                    values[name] = _as_json(value)
        return values

    def describe(self, has_control: bool | None = None) -> dict[str, Any]:
        """Return the table's entry in the metadata list `ss_datasets`.

        Args:
            has_control: Whether there are control images; None if that follows from control_directory.
        """
        entry: dict[str, Any] = {
            "resolution": list(self.buckets.resolution),
            "caption_extension": self.captions.caption_extension,
            "batch_size_per_device": self.learning.batch_size,
            "num_repeats": self.learning.num_repeats,
            "enable_bucket": self.buckets.enable_bucket,
            "bucket_no_upscale": self.buckets.bucket_no_upscale,
            self.source_key: self.source.path.name,
        }
        if self.buckets.rule is not None:
            entry |= self.buckets.rule.describe()
        if self.buckets.rule is not None or self.captions.class_tokens is not None:
            entry["class_tokens"] = self.captions.class_tokens
        if self.references.control_directory is not None:
            entry["control_directory"] = self.references.control_directory.name
        entry["has_control"] = (
            self.references.control_directory is not None if has_control is None else has_control
        )
        if self.kind == "video":
            entry["target_frames"] = list(self.buckets.target_frames)
            for name in get_cache_key_defaults(FRAMES):
                is_default_rate = name == "target_fps" and self.buckets.target_fps is None  # left out
                if name != "target_frames" and not is_default_rate:
                    entry[name] = self.value_of(name)
        return entry | self.non_default_values(SECTIONS) | self.learning_keys  # only keys that were set


RECORDS: Mapping[str, type[Any]] = {
    "source": Source,
    "buckets": Buckets,
    "captions": Captions,
    "references": References,
    "learning": Learning,
}
# name of the record of a table that has a field
_RECORD_BY_FIELD = {each.name: name for name, record in RECORDS.items() for each in fields(record)}


def list_fields() -> list[Field[Any]]:
    """Return the fields of a table and of its records."""
    own = [each for each in fields(DatasetTable) if each.name not in RECORDS]
    return own + [each for record in RECORDS.values() for each in fields(record)]


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset file that has been read and checked."""

    path: Path
    datasets: tuple[DatasetTable, ...]


# values of `mask` in a latent record: where the loss mask comes from
FROM_FILE, FROM_ALPHA = "file", "alpha"
# keys in the settings of a text record: what the encoder saw in addition to the caption
CLIP, MEDIA = "clip", "media"
# key in the same settings, set if pixel positions in the caption were converted to the resized image
FITTED = "fitted"


class FurtherText(NamedTuple):
    """An additional text of a row with `references`; one network reads it instead of the caption."""

    key: str  # key in rows, and in the settings of a text record
    reader: str  # name of the network, for messages


FURTHER_TEXT = FurtherText("teacher_caption", "the teacher")


def declared_keys(record: Any) -> dict[str, forms.TableKey]:
    """Return the dataset keys that a class declares, `DatasetTable` or a `FormatKeys`, by name."""
    declared = list_fields() if record is DatasetTable else fields(record)
    return {each.name: each.metadata["key"] for each in declared if "key" in each.metadata}


@functools.cache
def get_cache_key_defaults(stale: Stale, record: Any = DatasetTable) -> dict[str, Any]:
    """Return the default values, by name, of the keys whose changes make these caches (`stale`) invalid."""
    keys = {name: key for name, key in declared_keys(record).items() if key.stale & stale}
    # `rank` keeps the order of keys in metadata
    return {name: keys[name].default for name in sorted(keys, key=lambda name: keys[name].rank)}


def _as_json(value: Any) -> Any:
    """Convert a value to JSON types; a path is reduced to its last part."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple):
        return list(value)
    return value


def folder_id(folder: str | os.PathLike[str]) -> str:
    """Return a string that is equal for all paths that lead to the same folder."""
    return os.path.normcase(os.path.realpath(folder))
