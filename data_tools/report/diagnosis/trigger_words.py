"""Findings about trigger words: how the tokenizers of the model cut them, and where captions use them."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from data_tools.report.diagnosis.contract import MeasuredDataset
from data_tools.report.diagnosis.finding import Finding
from modules.console import format_count
from protocols.rules import CountTokens, TextPiece

MAX_PIECES = 3  # of a trigger word in each tokenizer
MIN_PRESENT = 0.9  # fraction of captions that should contain the trigger word
# syllables of proposed words: pronounceable, and rare as words of any language that models were trained on
_FIRST = ("zw", "vr", "kn", "qu", "xy", "dj", "gl", "sk")
_SECOND = ("olf", "ax", "ime", "upp", "ert", "ong", "ibb", "azz")


def find_trigger_findings(dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about each trigger word of a dataset."""
    for word in dataset.trigger_words:
        if dataset.counters:
            yield from _find_cut_words(word, dataset)
        yield from _find_missing_words(word, dataset)


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


def propose_word(counters: Mapping[str, CountTokens], taken: Iterable[str]) -> str | None:
    """Return a made-up word that every tokenizer cuts into two or three pieces of several letters; else None.

    Args:
        counters: Token counters of all text encoders, by name.
        taken: Texts that must not contain the word.
    """
    texts = "\n".join(taken).lower()
    for first, second in itertools.product(_FIRST, _SECOND):
        word = first + second
        pieces_by_encoder = cut_into_pieces(word, counters)
        is_rare = all(
            1 < len(pieces) <= MAX_PIECES and all(len(piece.text.strip()) > 1 for piece in pieces)
            for pieces in pieces_by_encoder.values()
        )
        if is_rare and pieces_by_encoder and word not in texts:
            return word
    return None


def _find_cut_words(word: str, dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about a word of too many pieces, and about one that the model knows."""
    pieces_by_encoder = cut_into_pieces(word, dataset.counters)
    if not pieces_by_encoder:
        return
    proposal = propose_word(dataset.counters, [caption.text for caption in dataset.captions])
    change = (
        "Choose a made-up word of two syllables" if proposal is None else f"Take a word such as {proposal}"
    )
    remedy = (
        f"{change}: write it in the captions and as trigger_word in {dataset.path.name}, and cache again."
    )
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
            remedy=remedy,
        )
    # several words may well contain known ones: `zwolf cat` has the class word
    if len(word.split()) == 1 and word.isalpha() and all(len(p) == 1 for p in pieces_by_encoder.values()):
        yield Finding(
            "trigger-known",
            word,
            figure=1,
            limit=2,
            text=f"All text encoders know the trigger word {word} as a single token.",
            meaning="The model has a meaning for it, which the training must first overcome.",
            remedy=remedy,
        )


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
        )
    other_capitals = [
        match[0]
        for caption in dataset.captions
        for match in in_any_case.finditer(caption.text)
        if match[0] != word
    ]
    if other_capitals and _tells_capitals(word, other_capitals[0], dataset.counters):
        yield Finding(
            "trigger-capitals",
            word,
            figure=len(other_capitals),
            limit=1,
            text=f"Captions spell the trigger word {word} differently "
            f"{format_count(len(other_capitals), 'time')}, as {other_capitals[0]}.",
            meaning="To the text encoder these are different words; each learns a part.",
            remedy="Spell the word the same in every caption.",
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
