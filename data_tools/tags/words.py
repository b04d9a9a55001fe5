"""Choose tags by their probabilities, and put them in order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_tools.tags.labels import CATEGORIES, CHARACTER, QUALITY, RATING, Label
from dataset.subset_options import KEEP_TOKENS_SEPARATOR
from modules.errors import OptionError
from modules.options import Options, option

_LONGEST_FACE = 3  # characters of tags such as ^_^, whose underscore stays
# longer ones. Source: the taggers' own list (github.com/SmilingWolf/wd-tagger)
_LONG_FACES = frozenset({"(o)_(o)", "<o>_<o>", "<|>_<|>", "||_||"})


class ThresholdOptions(Options, title="which tags are taken"):
    """Minimum probability of a tag, for each category."""

    thresh: float = option("least probability of a tag", default=0.35, minimum=0, maximum=1)
    general_threshold: float | None = option("the same, of what is seen; --thresh", minimum=0, maximum=1)
    character_threshold: float | None = option("the same, of characters; --thresh", minimum=0, maximum=1)
    copyright_threshold: float | None = option(
        "the same, of series and brands; --thresh", minimum=0, maximum=1
    )
    artist_threshold: float | None = option("the same, of artists; --thresh", minimum=0, maximum=1)
    meta_threshold: float | None = option("the same, about the file itself; --thresh", minimum=0, maximum=1)
    model_threshold: float | None = option("the same, of image models; --thresh", minimum=0, maximum=1)
    use_rating_tags: bool = option("put the most probable rating first")
    use_rating_tags_as_last_tag: bool = option("put it last", excludes="use_rating_tags")
    use_quality_tags: bool = option("put the most probable quality first, if the tagger has qualities")
    use_quality_tags_as_last_tag: bool = option("put it last", excludes="use_quality_tags")
    undesired_tags: str = option("tags never written, with --caption_separator between them", default="")


class TagWordOptions(Options, title="the text that is written"):
    """How tags are spelled and in which order they are written."""

    remove_underscore: bool = option(
        "replace underscores with spaces, except in emoticons such as ^_^ and (o)_(o)"
    )
    character_tags_first: bool = option("put characters before all that is seen")
    character_tag_expand: bool = option("write name_(series) as two tags: name, series")
    always_first_tags: str = option(
        "tags put at the beginning, in this order, where they are found", default=""
    )
    tag_replacement: str = option(
        r"tags to write as others: a,b;c,d is b for a and d for c; \, and \; are signs of a tag",
        default="",
    )
    caption_separator: str = option('between two tags; default: ", "', default=", ")


@dataclass(frozen=True)
class TagSelection:
    """Which tags are written, and in which spelling and order."""

    thresholds: Mapping[str, float]  # least probability by category
    # where the most probable rating and quality are written: "first", "last" or None: nowhere
    tag_positions: Mapping[str, str | None]
    excluded_tags: frozenset[str]
    replacements: Mapping[str, str]
    removes_underscores: bool
    expands_characters: bool  # writes name_(series) as two tags
    characters_first: bool
    always_first: tuple[str, ...]
    sorts_by_probability: bool  # by falling probability, else in the order of the labels

    def select_tags(self, labels: Sequence[Label], probabilities: Sequence[float]) -> list[str]:
        """Select the tags of an image from the probability of each label.

        Tags whose probability reaches the threshold of their category are selected. The categories rating
        and quality instead give their most probable tag, or none.
        """
        order = list(range(len(labels)))
        if self.sorts_by_probability:
            # stable: tags of equal probability stay in the order of the labels
            order.sort(key=lambda index: -probabilities[index])
        characters: list[str] = []
        general: list[str] = []
        for index in order:
            label = labels[index]
            if label.category in self.tag_positions:  # rating and quality: `select_tags` adds these
                continue
            if probabilities[index] < self.thresholds[label.category]:
                continue
            if self.characters_first and label.category == CHARACTER:
                characters += self._spell(label)
            else:
                general += self._spell(label)
        tags = [*characters, *general]
        for category, position in self.tag_positions.items():
            indices = [index for index, label in enumerate(labels) if label.category == category]
            if position is None or not indices:
                continue
            most_probable = max(indices, key=lambda index: probabilities[index])
            category_tags = self._spell(labels[most_probable])
            tags = [*category_tags, *tags] if position == "first" else [*tags, *category_tags]

        distinct_tags = list(dict.fromkeys(tag for tag in tags if tag not in self.excluded_tags))
        front = [tag for tag in self.always_first if tag in distinct_tags]
        return [*front, *(tag for tag in distinct_tags if tag not in front)]

    def _spell(self, label: Label) -> list[str]:
        """Return the tags to write for a label: one, or a name and a series; [] if the tag is excluded."""
        if label.name in self.excluded_tags:
            return []
        names = [label.name]
        series = re.fullmatch(r"(.+?)_?\(([^()]+)\)", label.name)
        if self.expands_characters and label.category == CHARACTER and series:
            names = [series[1], series[2]]
        spelled = [remove_underscores(name) for name in names] if self.removes_underscores else names
        return [self.replacements.get(tag, tag) for tag in spelled]


def remove_underscores(tag: str) -> str:
    """Replace underscores in a tag by spaces, except in emoticons such as ^_^."""
    is_face = len(tag) <= _LONGEST_FACE or tag in _LONG_FACES
    return tag if is_face else tag.replace("_", " ")


def make_tag_selection(
    filters: ThresholdOptions, spelling: TagWordOptions, sorts_by_probability: bool
) -> TagSelection:
    """Return which tags are written, and how, from the command line's options.

    Raises:
        OptionError: If --tag_replacement is malformed.
    """
    separator = spelling.caption_separator.strip()
    thresholds = {}
    # rating and quality need no threshold: only their most probable tag is used
    for category in CATEGORIES - {RATING, QUALITY}:
        value = getattr(filters, f"{category}_threshold")
        thresholds[category] = filters.thresh if value is None else value
    tag_positions = {
        QUALITY: _select_position(filters.use_quality_tags, filters.use_quality_tags_as_last_tag),
        RATING: _select_position(filters.use_rating_tags, filters.use_rating_tags_as_last_tag),
    }
    # such as `a,b;c,d`
    replacements = {}
    for pair in filter(None, re.split(r"(?<!\\);", spelling.tag_replacement)):
        tags = [re.sub(r"\\([,;])", r"\1", tag).strip() for tag in re.split(r"(?<!\\),", pair)]
        if len(tags) != 2 or not all(tags):
            raise OptionError(f"--tag_replacement: {pair!r} must be two tags, the old and the new one")
        old_tag, new_tag = tags
        replacements[old_tag] = new_tag
    return TagSelection(
        thresholds=thresholds,
        tag_positions=tag_positions,
        excluded_tags=frozenset(split_tags(filters.undesired_tags, separator)),
        replacements=replacements,
        removes_underscores=spelling.remove_underscore,
        expands_characters=spelling.character_tag_expand,
        characters_first=spelling.character_tags_first,
        always_first=tuple(split_tags(spelling.always_first_tags, separator)),
        sorts_by_probability=sorts_by_probability,
    )


def _select_position(is_first: bool, is_last: bool) -> str | None:
    """Return the end of the tag list at which a category's tag is written: "first", "last" or None (neither).

    `is_first` and `is_last` are the options for the two ends; `is_first` takes precedence.
    """
    if is_first:
        return "first"
    return "last" if is_last else None


def split_tags(text: str, separator: str) -> list[str]:
    """Split a text at `separator` into tags, without surrounding spaces."""
    return [tag.strip() for tag in text.split(separator) if tag.strip()]


def extend_caption(caption: str, tags: Sequence[str], separator: str) -> str:
    """Append the tags that a caption does not contain yet."""
    present = split_tags(caption.replace(KEEP_TOKENS_SEPARATOR, separator), separator.strip())
    missing = [tag for tag in tags if tag not in present]
    if not missing:
        return caption
    before = caption.strip().removesuffix(separator.strip()).rstrip()
    return separator.join([before, *missing] if before else missing)
