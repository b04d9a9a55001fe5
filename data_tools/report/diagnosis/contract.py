"""What a diagnosis of a dataset reads and returns."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.report.findings import TableFindings
from dataset.sources.remarks import unvaried_captions
from protocols.rules import CountTokens

MIN_SHARED = 0.9  # fraction of the captions that begin with a word which is then taken as the trigger word
MIN_CAPTIONS = 3
_ARTICLES = frozenset({"a", "an", "the"})


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


def list_captions(tables: Sequence[TableFindings]) -> list[DatasetCaption]:
    """Return the captions of all tables as text encoders get them, with their trigger words.

    Captions of a table without trigger_word get the word with which nearly all of them begin.
    """
    captions = []
    for findings in tables:
        table = findings.table
        texts = [(source, text) for source in findings.sources for text in unvaried_captions(source)]
        word = table.captions.trigger_word or _find_shared_beginning([text for _, text in texts])
        for source, text in texts:
            captions.append(
                DatasetCaption(
                    text,
                    path=source.caption_path or source.path,
                    table=table.name,
                    trigger_word=word,
                    is_regularization=table.learning.is_reg,
                )
            )
    return captions


def _find_shared_beginning(captions: Sequence[str]) -> str:
    """Return the word with which nearly all captions begin, the trigger word of most datasets; else ""."""
    first_words = Counter(caption.split()[0].strip(",.:;") for caption in captions if caption.split())
    if len(captions) < MIN_CAPTIONS or not first_words:
        return ""
    word, count = first_words.most_common(1)[0]
    is_shared = count >= MIN_SHARED * len(captions) and word.lower() not in _ARTICLES
    return word if is_shared else ""
