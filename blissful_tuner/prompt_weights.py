"""Weights for parts of a prompt: `a (red:1.4) car`. Reading them; text encoders apply them.

`(text:1.4)` gives `text` that weight, `(text)` the weight 1.1. A weight has digits, and maybe a point and a
sign; with anything else behind the last colon all of it is plain text, parentheses included. `\\(` and `\\)`
are parentheses. There is no nesting: the inner pair counts, and the outer one stays in the text.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from blissful_tuner.wildcards import NUMBER
from modules.contract.requests import Prompt, Prompts, Spans
from modules.control_codes import shorten
from modules.errors import OptionError

USUAL = 1.1  # of (text)
MOST = 100.0  # a larger one is a slip of the finger, and would overflow float16
_MARKS = re.compile(r"\\[()]|[()]")


def parse_weights(text: str) -> tuple[str, Spans]:
    """Return a text without the marks, and its weighted parts as (start, end, weight) in characters of it.

    Parts neither begin nor end with white space, and a weight of 1 is none. Takes time in proportion to the
    length. Raises OptionError for a weight beyond MOST.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int, float]] = []
    length = place = 0
    opened: tuple[int, int] | None = None  # the last "(" without its ")": number of the piece, its place
    for mark in _MARKS.finditer(text):
        pieces.append(text[place : mark.start()])
        length += mark.start() - place
        place = mark.end()
        if mark[0] == ")" and opened is not None:
            piece, start = opened
            inside = "".join(pieces[piece + 1 :])
            opened = None
            found = _weight_of(inside)
            if found is not None:
                part, weight = found
                pieces[piece:] = [part]
                length = start + len(part)
                first = start + len(part) - len(part.lstrip())
                if weight != 1:
                    spans.append((first, first + len(part.strip()), weight))
                continue
        if mark[0] == "(":
            opened = len(pieces), length
        pieces.append(mark[0][-1])
        length += 1
    return "".join(pieces) + text[place:], tuple(spans)


def _weight_of(inside: str) -> tuple[str, float] | None:
    """Return the text between parentheses and its weight; None if they are parentheses only."""
    text, colon, number = inside.rpartition(":")
    if not colon:
        return (inside, USUAL) if inside.strip() else None
    if not text.strip() or not NUMBER.fullmatch(number):
        return None
    weight = float(number) if len(number) < 40 else float("inf")
    if abs(weight) > MOST:
        raise OptionError(
            f"--prompt_weighting: ({shorten(inside, 60)}) gives a weight of more than {MOST:g}; 0.5 to 1.5 "
            "are usual. For a text with parentheses write \\( and \\)"
        )
    return text, weight


def weigh(prompt: Prompt) -> Prompt:
    """Return a prompt with the weights that stand in its text, which loses the marks.

    The second text loses them too, and has no weights: CLIP, which reads it, makes one vector of it all.
    """
    text, spans = parse_weights(prompt.text)
    second = None if prompt.second is None else parse_weights(prompt.second)[0]
    return replace(prompt, text=text, spans=spans, second=second)


def weigh_all(by_section: Mapping[int, Prompts]) -> dict[int, Prompts]:
    """Return the texts of all sections with the weights that stand in them."""

    def weighed(prompt: Prompt | None) -> Prompt | None:
        return None if prompt is None else weigh(prompt)

    return {
        section: Prompts(
            weigh(texts.positive), weighed(texts.negative), weighed(texts.blank), weighed(texts.away)
        )
        for section, texts in by_section.items()
    }
