"""What the subsets of image trainers ask of a table beside the keys of our own. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionChanges:
    """How a caption differs each time its picture is trained; parts are what `separator` separates."""

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
    def varies(self) -> bool:
        """Whether a caption is not always the same, so that its embeddings cannot be cached."""
        return self != CaptionChanges(
            separator=self.separator,
            keep_tokens=self.keep_tokens,
            keep_tokens_separator=self.keep_tokens_separator,
            dropout_every_n_epochs=self.dropout_every_n_epochs,  # the empty prompt is cached
            secondary_separator=self.secondary_separator,
            warmup_min=self.warmup_min,
            is_raw=self.is_raw,
        )


@dataclass(frozen=True)
class Augmentation:
    """How a picture differs each time it is trained."""

    flip: bool = False  # latents of both sides are cached
    color: bool = False  # hue and gamma
    random_crop: bool = False
    face_crop_range: tuple[float, float] | None = None

    @property
    def excludes_caches(self) -> bool:
        """Whether pictures must be encoded each time."""
        return self.color or self.random_crop or self.face_crop_range is not None


@dataclass(frozen=True)
class BucketRule:
    """The buckets of image trainers; all sizes in pixels."""

    minimum: int = 256
    maximum: int = 1024
    step: int = 64
    interpolation: str | None = None  # None: area when shrinking, else lanczos


PLAIN_CAPTIONS = CaptionChanges()
NO_AUGMENTATION = Augmentation()
