"""Nearest mistakes with words that a training learns: each would go unnoticed by its result."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from encoders.new_words import NewWord, name_ids
from modules.errors import OptionError
from stable_diffusion.textual_inversion import tokenize_with_words
from stable_diffusion.training_options import InversionOptions
from tests.stable_diffusion.test_inversion_training import WORD, inversion_family, make_rows
from tests.training.toy import toy_options


def test_single_vectors_are_counted_from_1_behind_the_first() -> None:
    assert NewWord(WORD, 3).list_ids(100) == {
        WORD: [100, 101, 102],
        f"{WORD}1": [101],
        f"{WORD}2": [102],
    }


def test_a_name_is_that_of_a_word_before_a_vector_before_an_alias() -> None:
    words = [
        NewWord("cat", 3, copies=2, alias="<cat>"),
        NewWord("cat1", alias="CAT"),
        NewWord("x", 2, alias="<cat>"),
    ]

    assert name_ids([*words, NewWord("y", alias="cat2")], 10) == {
        "cat": [10, 11, 12],
        "cat2": [12],
        "cat1": [16],  # the first one has its vectors twice
        "x": [17, 18],
        "x1": [18],
        "y": [19],
        "<cat>": [10, 11, 12],
    }


def test_a_word_stands_for_its_vectors_wherever_it_is_in_a_caption() -> None:
    ids = NewWord(WORD, 2).list_ids(100)
    tokenize = tokenize_with_words(lambda text: [len(text.split())] if text.strip() else [], ids)

    assert tokenize(f"{WORD}, a cat and {WORD.upper()}") == [100, 101, 4, 100, 101]
    assert tokenize(f"a{WORD} {WORD}s {WORD}_") == [3]


def test_initial_words_are_read_without_start_end_and_padding(tmp_path: Path) -> None:
    """A padding or end token as the first vector would begin at the same place for all words."""
    family = inversion_family("sd1", tmp_path, num_vectors_per_token=2, init_word="cat")
    rows, texts = make_rows(family)
    words = family.files.tokenizers[0]
    (network,) = texts.networks.values()
    table = network.get_submodule("embeddings.token_embedding").get_parameter("weight")

    assert set(words.tokenize("cat")).isdisjoint({words.start, words.end})
    for special in (words.start, words.end):
        assert not (rows.get_parameter("emb_params") == table[special]).all(dim=1).any()


@pytest.mark.parametrize("way", ["token_string", "train_embedding"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Zorb", "Pass zorb"),
        ("a zorb", "one word"),
        ("zorb1", "ends with a digit"),
        ("zorb(x)", "contains ("),
    ],
)
def test_both_ways_refuse_the_same_words(tmp_path: Path, way: str, text: str, told: str) -> None:
    ways: dict[str, Callable[[], object]] = {
        "token_string": lambda: InversionOptions.from_defaults(token_string=text),
        "train_embedding": lambda: toy_options(tmp_path, "--train_embedding", text),
    }

    with pytest.raises(OptionError, match=rf"--{way} .*{re.escape(told)}"):
        ways[way]()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--embedding_vectors", 2), "--train_embedding"),
        (("--embedding_until", 0.5), "--train_embedding"),
        (("--train_embedding", WORD, "--embedding_vectors", 0), "--embedding_vectors 0"),
        (("--train_embedding", WORD, "--embedding_vectors", 76), "--embedding_vectors 76"),
        (("--train_embedding", WORD, "--embedding_lr", 0), "--embedding_lr 0"),
        (("--train_embedding", WORD, "--embedding_until", 2), "--embedding_until 2"),
    ],
)
def test_numbers_of_a_word_are_limited(tmp_path: Path, words: tuple[object, ...], told: str) -> None:
    with pytest.raises(OptionError, match=re.escape(told)):
        toy_options(tmp_path, *words)
