"""What a diagnosis of a dataset reads and returns."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.report.findings import TableFindings
from dataset.sources.remarks import unvaried_captions
from protocols.rules import CountTokens

MIN_SHARED = 0.9  # fraction of the captions that begin with a word which is then taken as the trigger word
# the same for a made-up word: the other captions may lack it by mistake
MIN_MADE_UP = 0.6
MIN_CAPTIONS = 3
MAX_NAMES = 5  # words with which the captions of one table begin in turn, such as the names of a family
MIN_NAMED = 0.05  # fraction of the captions that begin with each of these
# words that carry no content of their own, or only say what kind of picture it is
_EMPTY = (
    "a an the of in on at to and or with is are be it its this that there these by for from as into onto his "
    "her their one two three photo photograph picture image video clip drawing painting illustration style "
    "shot scene view close closeup close-up portrait selfie"
)
EMPTY_WORDS = frozenset(_EMPTY.split())
# words for a background: which all images may share, so that all captions should name it
GROUND = re.compile(
    r"\b(backgrounds?|backdrops?|ground|walls?|floors?|rooms?|indoors?|outdoors?|studio|sky|kitchen|office|"
    r"street|forest|beach|snow|grass|field|garden|park|sea|ocean|desert|city|stage)\b",
    re.IGNORECASE,
)
# tags with which tagged captions begin, whatever the images show
_FIRST_TAGS = frozenset({"1girl", "1boy", "2girls", "2boys", "solo", "masterpiece", "best"})


@dataclass(frozen=True)
class DatasetCaption:
    """A caption as the training uses it, with its trigger word."""

    text: str
    path: Path  # of the caption, or of the media file if the caption has no file
    table: str  # name of the dataset table
    trigger_word: str  # "": none is known
    is_regularization: bool


@dataclass(frozen=True)
class MeasuredDataset:
    """A dataset whose media files were measured and whose captions were read."""

    path: Path  # the dataset file
    tables: Sequence[TableFindings]
    copies: Sequence[Sequence[Path]]  # groups of files that are nearly the same
    captions: Sequence[DatasetCaption]
    counters: Mapping[str, CountTokens]  # of the model's text encoders, by name; empty: none is known

    @property
    def learned_captions(self) -> list[DatasetCaption]:
        """The captions that are not those of regularization images."""
        return [caption for caption in self.captions if not caption.is_regularization]

    @property
    def trigger_words(self) -> list[str]:
        """The trigger words, in the order of the tables."""
        return list(dict.fromkeys(caption.trigger_word for caption in self.captions if caption.trigger_word))


def list_captions(
    tables: Sequence[TableFindings], counters: Mapping[str, CountTokens] | None = None
) -> list[DatasetCaption]:
    """Return the captions of all tables to train on as text encoders get them, with their trigger words.

    Captions of a table without trigger_word get the word of another table that nearly all of them contain,
    else the word with which nearly all of them begin, or one of a few made-up names with which they begin in
    turn. Only tokenizers (`counters`) tell names from other words.
    """
    captions = []
    trained = [findings for findings in tables if not findings.table.learning.validation]
    typed = {findings.table.captions.trigger_word for findings in trained} - {""}
    for findings in trained:
        table = findings.table
        texts = [(source, text) for source in findings.sources for text in unvaried_captions(source)]
        words = [table.captions.trigger_word]
        if not words[0] and not table.learning.is_reg:
            all_texts = [text for _, text in texts]
            shared = next((word for word in sorted(typed) if _is_in_most(word, all_texts)), None)
            words = find_shared_beginnings(all_texts, counters or {}) if shared is None else [shared]
        for source, text in texts:
            own_word = words[0]
            if len(words) > 1:
                own_word = next((word for word in words if _first_word(text) == word), "")
            captions.append(
                DatasetCaption(
                    text,
                    path=source.caption_path or source.path,
                    table=table.name,
                    trigger_word=own_word,
                    is_regularization=table.learning.is_reg,
                )
            )
    return captions


def _is_in_most(word: str, captions: Sequence[str]) -> bool:
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    count = sum(pattern.search(caption) is not None for caption in captions)
    return bool(captions) and count >= MIN_SHARED * len(captions)


def find_shared_beginnings(captions: Sequence[str], counters: Mapping[str, CountTokens]) -> list[str]:
    """Return the word, or the names, with which nearly all captions begin; [""] if there are none."""
    first_words = Counter(_first_word(caption) for caption in captions if caption.split())
    frequent = first_words.most_common(MAX_NAMES)
    if len(captions) < MIN_CAPTIONS or not frequent:
        return [""]
    word, count = frequent[0]
    if count >= MIN_SHARED * len(captions):
        return [""] if word.lower() in EMPTY_WORDS | _FIRST_TAGS else [word]
    names = [
        word
        for word, count in frequent
        if count >= max(2, MIN_NAMED * len(captions)) and _is_made_up(word, counters)
    ]
    named = sum(first_words[name] for name in names)
    is_shared = named >= (MIN_MADE_UP if len(names) == 1 else MIN_SHARED) * len(captions)
    return names if names and is_shared else [""]


def _first_word(caption: str) -> str:
    return caption.split()[0].strip(",.:;") if caption.split() else ""


def _is_made_up(word: str, counters: Mapping[str, CountTokens]) -> bool:
    """Return whether no tokenizer knows a word as one token; False if no tokenizer is known."""
    num_pieces = [len(count_tokens(f"a {word}").pieces) - 1 for count_tokens in counters.values()]
    return word.lower() not in EMPTY_WORDS | _FIRST_TAGS and min(num_pieces, default=0) > 1
