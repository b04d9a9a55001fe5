"""Give tiny models tokenizers with a vocabulary: those of the tests cut nearly every word into letters."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from tests.commands import ROOT

SIZE = 4000  # of the vocabularies
# single letters and digits, in the middle and at the end of a word
LETTERS = " ".join("abcdefghijklmnopqrstuvwxyz0123456789")
T5_TOKENS = ["<pad>", "</s>", "<s>", "<unk>"]
CLIP_TOKENS = ["<|startoftext|>", "<|endoftext|>"]
# what captions speak of, often enough to be tokens
WORDS = (
    "a man",
    "a woman",
    "a cat",
    "a dog",
    "a house",
    "a red car",
    "in a park",
    "on a street",
    "a photo of",
)


@cache
def read_corpus() -> tuple[str, ...]:
    """Return lines of English: the prose of our documents, and words of captions."""
    lines = [LETTERS, LETTERS.replace(" ", ""), *WORDS * 200]
    for path in sorted((ROOT / "docs").glob("*.md")):
        # without commands, whose names of options stand in no caption
        prose = re.sub(r"```.*?```|`[^`]*`|\([^)]*\)", " ", path.read_text("utf-8"), flags=re.DOTALL)
        lines += [line for line in prose.splitlines() if line and line[0].isalpha()]
    return tuple(lines)


def widen_vocabularies(folder: Path) -> None:
    """Train each tokenizer below a folder of model files on prose, in its own form."""
    for path in folder.rglob("tokenizer.json"):
        _retrain(path)
        # the same vocabulary in another form, which would be read first
        path.with_name("spiece.model").unlink(missing_ok=True)
    for path in folder.rglob("vocab.json"):
        if not path.with_name("tokenizer.json").exists():
            _write_clip(path.parent)


def _retrain(path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    own = [AddedToken(token["content"], special=True, normalized=False) for token in _list_own_tokens(path)]
    if isinstance(tokenizer.model, models.Unigram):
        trainer = trainers.UnigramTrainer(
            vocab_size=SIZE, special_tokens=T5_TOKENS, unk_token="<unk>", show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=SIZE,
            special_tokens=own,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(read_corpus(), trainer)
    tokenizer.save(str(path))


def _list_own_tokens(path: Path) -> Iterator[dict[str, str]]:
    yield from json.loads(path.read_text("utf-8"))["added_tokens"]


def _write_clip(folder: Path) -> None:
    """Write CLIP's form, vocab.json and merges.txt, whose last token ends a text."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.lower() for line in read_corpus()], trainer)
    tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    for token in CLIP_TOKENS:
        vocabulary[token] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
