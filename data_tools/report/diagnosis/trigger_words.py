"""Findings about trigger words: how the tokenizers of the model cut them, and where captions use them."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_tools.report.diagnosis.contract import DatasetCaption, MeasuredDataset
from data_tools.report.diagnosis.finding import Finding
from modules.console import format_count
from protocols.rules import CountTokens, TextPiece

MAX_PIECES = 3  # of a trigger word in each tokenizer
MIN_PRESENT = 0.9  # fraction of captions that should contain the trigger word
# syllables of proposed words: together they are pronounceable, and rare as words of any language
_FIRST = (
    *("zw", "vr", "kn", "qu", "xy", "dj", "gl", "sk", "ar", "or", "ul", "en", "la", "mo", "ri", "ve"),
    *("nav", "lar", "spe", "th", "wid"),
)
_SECOND = ("olf", "ax", "ime", "upp", "ert", "ong", "ibb", "azz", "ape", "own", "eld", "ush", "oud", "ane")
# number of a token / highest number of a token of made-up words, from which it is rare. In CLIP's tokenizer
# it is 0.98 for the single tokens sks and ohwx, which many take for want of a meaning, and 0.6 for goku
RARE = 0.95
# words for the sex of a person that stand directly behind the trigger word, as in `ohwx man`
_MEN = frozenset({"man", "boy", "guy", "gentleman", "male"})
_WOMEN = frozenset({"woman", "girl", "lady", "female"})
MIN_SUBJECT = 0.2  # fraction of the captions that name the rarer of two subjects
MIN_NAMED = 0.8  # fraction of the captions that name one of them


def find_trigger_findings(dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about each trigger word of a dataset."""
    for word in dataset.trigger_words:
        if dataset.counters:
            yield from _find_cut_words(word, dataset)
        yield from _find_missing_words(word, dataset)
        yield from _find_two_subjects(word, dataset)


def cut_into_pieces(word: str, counters: Mapping[str, CountTokens]) -> dict[str, tuple[TextPiece, ...]]:
    """Return the pieces of a word inside a text, by the name of the encoder whose tokenizer cuts it.

    Encoders that do not say what their tokens stand for are omitted.
    """
    pieces_by_encoder = {}
    for encoder, count_tokens in counters.items():
        # after another word, because most tokenizers join a word with the space in front of it
        pieces = count_tokens(f"a {word}").pieces[1:]
        word_pieces = tuple(piece for piece in pieces if piece.text.strip())
        if word_pieces:
            pieces_by_encoder[encoder] = word_pieces
    return pieces_by_encoder


def propose_word(
    counters: Mapping[str, CountTokens], taken: Iterable[str], words: Iterable[str] = ()
) -> str | None:
    """Return a made-up word that every tokenizer cuts into two or three rare pieces of several letters.

    Tokenizers number their pieces from frequent to rare ones, so that of all such words the one is taken
    whose most frequent piece has the highest number, relative to the highest of all.

    Args:
        counters: Token counters of all text encoders, by name.
        taken: Texts that must not contain the word.
        words: Other trigger words, with which it must not share a piece.

    Returns:
        The word; None if there is no such word.
    """
    texts = "\n".join(taken).lower()
    candidates = _cut_candidates(counters)
    highest = _find_highest_numbers(candidates)
    taken_pieces = {
        (encoder, piece.text.strip())
        for word in words
        for encoder, pieces in cut_into_pieces(word, counters).items()
        for piece in pieces
    }
    fitting = {
        word: pieces_by_encoder
        for word, pieces_by_encoder in candidates.items()
        if word not in texts
        and taken_pieces.isdisjoint(
            (encoder, piece.text.strip()) for encoder, pieces in pieces_by_encoder.items() for piece in pieces
        )
        and all(
            1 < len(pieces) <= MAX_PIECES and all(len(piece.text.strip()) > 1 for piece in pieces)
            for pieces in pieces_by_encoder.values()
        )
    }

    def measure_rarity(word: str) -> float:
        return min(
            piece.id / highest[encoder] for encoder, pieces in fitting[word].items() for piece in pieces
        )

    return max(fitting, key=measure_rarity, default=None)


def _cut_candidates(counters: Mapping[str, CountTokens]) -> dict[str, dict[str, tuple[TextPiece, ...]]]:
    """Return the pieces of each made-up word, by encoder; nothing if no encoder says what its tokens are."""
    words = [first + second for first, second in itertools.product(_FIRST, _SECOND)]
    cut = {word: cut_into_pieces(word, counters) for word in words}
    return {word: pieces_by_encoder for word, pieces_by_encoder in cut.items() if pieces_by_encoder}


def _find_highest_numbers(candidates: Mapping[str, Mapping[str, Sequence[TextPiece]]]) -> dict[str, int]:
    """Return the highest number of a piece by encoder, about the size of its vocabulary; at least 1."""
    highest: dict[str, int] = {}
    for pieces_by_encoder in candidates.values():
        for encoder, pieces in pieces_by_encoder.items():
            highest[encoder] = max(highest.get(encoder, 1), *(piece.id for piece in pieces))
    return highest


def _find_cut_words(word: str, dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about a word of too many pieces, and about one that the model knows."""
    pieces_by_encoder = cut_into_pieces(word, dataset.counters)
    if not pieces_by_encoder:
        return
    encoder, pieces = max(pieces_by_encoder.items(), key=lambda item: len(item[1]))
    if len(pieces) > MAX_PIECES * len(word.split()):
        listed = ", ".join(piece.text.strip() for piece in pieces)
        yield Finding(
            "trigger-pieces",
            word,
            figure=len(pieces),
            limit=MAX_PIECES * len(word.split()),
            text=f"{encoder} reads the trigger word {word} as {len(pieces)} pieces: {listed}.",
            meaning="Single letters and digits stand in many other prompts: their meaning hardly changes.",
            remedy=_propose_change(dataset),
        )
    # several words may well contain known ones: `zwolf cat` has the class word
    is_token = len(word.split()) == 1 and all(len(pieces) == 1 for pieces in pieces_by_encoder.values())
    if is_token and word.isalpha() and not _is_rare(pieces_by_encoder, dataset.counters):
        yield Finding(
            "trigger-known",
            word,
            figure=1,
            limit=2,
            text=f"All text encoders know the trigger word {word} as a single token, which is none of their "
            "rarest.",
            meaning="The model has a meaning for it, which the training must first overcome.",
            remedy=_propose_change(dataset),
        )


def _is_rare(
    pieces_by_encoder: Mapping[str, Sequence[TextPiece]], counters: Mapping[str, CountTokens]
) -> bool:
    """Return whether all pieces are among the last ones of their tokenizers."""
    highest = _find_highest_numbers(_cut_candidates(counters))
    return all(
        piece.id >= RARE * highest.get(encoder, piece.id + 1)
        for encoder, pieces in pieces_by_encoder.items()
        for piece in pieces
    )


def _propose_change(dataset: MeasuredDataset) -> str:
    proposal = propose_word(dataset.counters, [caption.text for caption in dataset.captions])
    change = (
        "Choose a made-up word of two syllables" if proposal is None else f"Take a word such as {proposal}"
    )
    return f"{change}: write it in the captions and as trigger_word in {dataset.path.name}, and cache again."


def _find_missing_words(word: str, dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about captions without the word, with other capitals, and of images that are not it."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    in_any_case = re.compile(pattern.pattern, re.IGNORECASE)
    own = [caption for caption in dataset.learned_captions if caption.trigger_word == word]
    without = [caption for caption in own if not in_any_case.search(caption.text)]
    if own and 1 - len(without) / len(own) < MIN_PRESENT:
        yield Finding(
            "trigger-missing",
            word,
            figure=1 - len(without) / len(own),
            limit=MIN_PRESENT,
            text=f"{len(without)} of {len(own)} captions lack the trigger word {word}, such as "
            f"{without[0].path.name}.",
            meaning="What these images show is learned for all prompts, not for the word.",
            remedy=f"Add the word to these captions, or set trigger_word in {dataset.path.name}.",
            files=[str(caption.path) for caption in without],
        )
    other_capitals = [
        (match[0], str(caption.path))
        for caption in dataset.captions
        for match in in_any_case.finditer(caption.text)
        if match[0] != word
    ]
    if other_capitals and _tells_capitals(word, other_capitals[0][0], dataset.counters):
        yield Finding(
            "trigger-capitals",
            word,
            figure=len(other_capitals),
            limit=1,
            text=f"Captions spell the trigger word {word} differently "
            f"{format_count(len(other_capitals), 'time')}, as {other_capitals[0][0]}.",
            meaning="To the text encoder these are different words; each learns a part.",
            remedy="Spell the word the same in every caption.",
            files=list(dict.fromkeys(path for _, path in other_capitals)),
        )
    # regularization images, and images of another concept
    others = [
        caption for caption in dataset.captions if caption.is_regularization or caption.trigger_word != word
    ]
    shared = [caption for caption in others if pattern.search(caption.text)]
    if shared:
        yield Finding(
            "trigger-shared",
            word,
            figure=len(shared),
            limit=1,
            text=f"The trigger word {word} also stands in {format_count(len(shared), 'caption')} of "
            f"{shared[0].table}, such as {shared[0].path.name}.",
            meaning="The word learns what these images show as well, and the concepts blend.",
            remedy="Remove the word from those captions.",
            files=[str(caption.path) for caption in shared],
        )


def _find_two_subjects(word: str, dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield a finding if the same word stands before `man` in some captions and before `woman` in others."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}\s+(\w+)", re.IGNORECASE)
    captions = [caption for caption in dataset.learned_captions if caption.trigger_word == word]
    men: list[DatasetCaption] = []
    women: list[DatasetCaption] = []
    for caption in captions:
        following = {match.lower() for match in pattern.findall(caption.text)}
        if following & _MEN and not following & _WOMEN:
            men.append(caption)
        elif following & _WOMEN and not following & _MEN:
            women.append(caption)
    rarer = min(men, women, key=len)
    if len(rarer) < max(2, MIN_SUBJECT * len(captions)) or len(men + women) < MIN_NAMED * len(captions):
        return
    texts = [caption.text for caption in dataset.captions]
    proposal = propose_word(dataset.counters, texts, dataset.trigger_words)
    other = "a word of their own" if proposal is None else f"a word of their own, such as {proposal}"
    yield Finding(
        "trigger-subjects",
        word,
        figure=len(rarer) / len(captions),
        limit=MIN_SUBJECT,
        text=f"The trigger word {word} stands for a man in {len(men)} captions and for a woman in "
        f"{len(women)}.",
        meaning="The word alone gives a mixture of both persons.",
        remedy=f"Write {other} in place of {word} in the {len(rarer)} captions, such as "
        f"{rarer[0].path.name}.",
        files=[str(caption.path) for caption in rarer],
    )


def _tells_capitals(word: str, other: str, counters: Mapping[str, CountTokens]) -> bool:
    """Return whether a text encoder reads two spellings differently; True if no tokenizer is known."""
    pieces_by_encoder = cut_into_pieces(word, counters)
    other_pieces = cut_into_pieces(other, counters)
    if not pieces_by_encoder:
        return True
    return any(
        [piece.id for piece in pieces] != [piece.id for piece in other_pieces.get(encoder, ())]
        for encoder, pieces in pieces_by_encoder.items()
    )
