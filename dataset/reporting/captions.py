"""Count the content of captions: lengths, words, and texts that occur more than once."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dataset.checking.captions import is_unread
from dataset.reporting.bins import count_bins, summarise
from dataset.sources.media_source import MediaSource
from modules.control_codes import shorten

MOST_WORDS = 60  # of the most frequent ones
MOST_DUPLICATES = 200  # texts that are listed
MOST_PATHS = 20  # of a text
SHOWN_TEXT = 300  # characters of a text that occurs more than once
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

# English words that say nothing about a picture; other languages are counted whole
_STOP_WORDS = """
a about above after again against all along also am an and any are around as at be because been before behind
being below between both but by can could did do does doing down during each either else etc every few for
from further had has have having he her here hers herself him himself his how i if in into is it it's its
itself just like made make makes more most near next no nor not of off on once one only onto or other our out
over own same she should so some such than that the their them then there these they this those through to
together too toward towards under until up upon very was we were what when where which while who whom whose
why will with within without would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


class CaptionCounts:
    """Count the captions of sources, one after the other."""

    def __init__(self) -> None:
        self._words: Counter[str] = Counter()
        self._holders: Counter[str] = Counter()  # in how many captions a word occurs
        self._lengths: list[int] = []  # words of each caption that is not empty
        self._characters: list[int] = []
        self._paths: dict[str, dict[Path, str]] = {}  # text -> paths by absolute path: each file once
        self._missing: list[str] = []
        self._unreadable: list[str] = []
        self._empty: list[str] = []
        self._triggers: Counter[str] = Counter()  # captions of tables with that trigger word
        self._found: Counter[str] = Counter()  # and those of them that hold it

    def add(self, source: MediaSource) -> None:
        """Count the captions of a source, with its table's additions."""
        path = str(source.path)
        if source.caption is None:
            (self._unreadable if is_unread(source) else self._missing).append(path)
            return
        for caption in (source.caption, *source.more_captions):
            self._add(caption, path, source.table.trigger_word)

    def _add(self, caption: str, path: str, trigger: str) -> None:
        if trigger:
            self._triggers[trigger] += 1
            self._found[trigger] += bool(re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption))
        if not caption.strip():
            self._empty.append(path)
            return
        words = [word.lower() for word in _WORD.findall(caption)]
        self._words.update(words)
        self._holders.update(set(words))
        self._lengths.append(len(words))
        self._characters.append(len(caption))
        self._paths.setdefault(caption, {}).setdefault(Path(path).absolute(), path)

    def result(self) -> dict[str, Any]:
        """Return all counts as JSON values."""
        repeated = {text: list(paths.values()) for text, paths in self._paths.items() if len(paths) > 1}
        ranked = sorted(repeated.items(), key=lambda item: (-len(item[1]), item[1][0]))
        return {
            "total": len(self._lengths) + len(self._empty),
            "empty": len(self._empty),
            "missing": len(self._missing),
            "unreadable": len(self._unreadable),
            "duplicates": sum(len(paths) - 1 for paths in repeated.values()),
            "words": summarise(self._lengths),
            "characters": summarise(self._characters),
            "words_histogram": count_bins(self._lengths),
            "distinct_words": len(self._words),
            "frequent_words": self._frequent(),
            "trigger_words": [
                {"word": word, "captions": count, "present": self._found[word]}
                for word, count in sorted(self._triggers.items())
            ],
            "duplicate_texts": [
                {"text": shorten(text, SHOWN_TEXT), "count": len(paths), "paths": paths[:MOST_PATHS]}
                for text, paths in ranked[:MOST_DUPLICATES]
            ],
            "empty_paths": self._empty,
            "missing_paths": self._missing,
            "unreadable_paths": self._unreadable,
        }

    def _frequent(self) -> list[dict[str, Any]]:
        """Return the words that the most captions hold, but for stop words."""
        telling = ((word, count) for word, count in self._words.items() if word not in STOP_WORDS)
        ranked = sorted(telling, key=lambda item: (-self._holders[item[0]], -item[1], item[0]))[:MOST_WORDS]
        return [{"word": word, "count": count, "captions": self._holders[word]} for word, count in ranked]


def count_captions(sources: Iterable[MediaSource]) -> dict[str, Any]:
    """Return the counts of the captions of sources as JSON values; see `CaptionCounts`."""
    counts = CaptionCounts()
    for source in sources:
        counts.add(source)
    return counts.result()
