"""A new word whose vectors text encoders learn: its options and what it may be.

It uses only the standard library, because options are checked with it.
"""

from dataclasses import dataclass
from pathlib import Path

MAX_VECTORS = 75  # a text encoder reads at most this many tokens at a time
STRANGE = '()[]{}|,:\\/<>*?"'  # characters with another meaning in prompts or file names


@dataclass(frozen=True)
class WordOptionNames:
    """The options of a script that describe a new word, as the user types them."""

    word: str
    count: str
    init_word: str
    weights: str
    rate: str
    without_captions: str = ""  # the option that learns a word without captions, if the script has one


@dataclass(frozen=True)
class WordToLearn:
    """A new word for captions and prompts, and the text that its vectors are initialized from."""

    text: str
    count: int  # of its vectors
    option_names: WordOptionNames
    init_word: str | None = None  # known words, whose vectors it starts with; None: random vectors
    weights: Path | None = None  # a file of the word; takes precedence over `lora` and `init_word`
    lora: Path | None = None  # from which training continues; it may contain the word
    # if it is trained in addition to another network
    rate: float | None = None  # learning rate of its vectors; None: the network's
    train_fraction: float = 1.0  # share of the steps in which they learn


def find_error(word: str) -> str:
    """Return why `word` cannot become a new token, and what to use instead; "" if it can."""
    if not word or word.split() != [word]:
        return "has spaces or is empty: pass one word, such as mycat"
    if word != word.lower():
        return f"has capitals, which the text encoders read as lower case. Pass {word.lower()}"
    if word[-1].isdigit():
        return (
            "ends with a digit, which after a word selects one of its vectors. Pass another, such as "
            f"{word.rstrip('0123456789') or 'mycat'}"
        )
    misread = next((character for character in word if character in STRANGE), None)
    if misread is not None:
        return f"contains {misread}, which prompts or file names interpret. Pass a word of letters, - and _"
    return ""
