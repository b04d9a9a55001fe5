"""Settings of image trainers' subsets beside the keys of our own tables. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionChanges:
    """How a caption differs each time its picture is trained; parts stand between separators."""

    shuffle: bool = False
    separator: str = ","
    keep_tokens: int = 0  # parts in front that stay in place
    keep_tokens_separator: str = ""  # at most three parts: fixed, shuffled, fixed; "": none
    secondary_separator: str = ""  # joins what is shuffled as one part; "": none
    wildcards: bool = False  # {a|b}; of several lines one is drawn
    dropout_every_n_epochs: int = 0  # in these epochs all captions are empty; 0: in none
    part_dropout_rate: float = 0.0
    warmup_min: int = 1  # parts that are there from the start
    warmup_step: float = 0.0  # until when the number of parts grows: steps, below 1 a share of all; 0: no
    is_raw: bool = False  # sources have the text of a caption file as it stands, to be changed each time

    @property
    def varying_keys(self) -> tuple[str, ...]:
        """Return the keys for which a caption is not always the same, so that its embeddings are not cached.

        Not caption_dropout_every_n_epochs: the empty prompt is cached.
        """
        keys = {
            "shuffle_caption": self.shuffle,
            "enable_wildcard": self.wildcards,
            "caption_tag_dropout_rate": self.part_dropout_rate > 0,
            "token_warmup_step": self.warmup_step > 0,
        }
        return tuple(key for key, is_set in keys.items() if is_set)

    @property
    def varies(self) -> bool:
        """Whether a caption is not always the same."""
        return bool(self.varying_keys)


@dataclass(frozen=True)
class Augmentation:
    """How a picture differs each time it is trained."""

    flip: bool = False  # latents of both sides are cached
    color: bool = False  # hue and gamma
    random_crop: bool = False
    face_crop_range: tuple[float, float] | None = None

    @property
    def varying_keys(self) -> tuple[str, ...]:
        """Return the keys for which pictures must be encoded each time; of flip_aug both sides are cached."""
        keys = {
            "color_aug": self.color,
            "random_crop": self.random_crop,
            "face_crop_aug_range": self.face_crop_range is not None,
        }
        return tuple(key for key, is_set in keys.items() if is_set)

    @property
    def excludes_caches(self) -> bool:
        """Whether pictures must be encoded each time."""
        return bool(self.varying_keys)


@dataclass(frozen=True)
class BucketRule:
    """The buckets of image trainers; all sizes in pixels."""

    minimum: int = 256
    maximum: int = 1024
    step: int = 64
    interpolation: str | None = None  # None: area when shrinking, else lanczos


PLAIN_CAPTIONS = CaptionChanges()
NO_AUGMENTATION = Augmentation()
