r"""Draws and weights in prompts: `a __color__ {red|blue} (fast:1.4) car`.

`__color__` is replaced by a random line of color.txt in the folder of --prompt_wildcards. A line may end with
a relative weight, `red:2`, and contain wildcards and alternatives itself. Draws are made from left to right
by a separate generator that is seeded by the video's seed, so the same seed gives the same prompt.

`(text:1.4)` gives `text` that weight, `(text)` the weight 1.1. A weight is a decimal number with an optional
sign; if anything else follows the last colon, all of it is plain text, including the parentheses. `\(` and
`\)` are literal parentheses. Nesting is not supported: only the inner pair counts, the outer one is plain
text.
"""

import bisect
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

from blissful_tuner.options import PromptOptions
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.limits import MAX_NESTED, MAX_WILDCARD_CHARACTERS, MAX_WILDCARD_DRAWS, MAX_WILDCARD_ROUNDS
from modules.text_files import bad_character, read_text
from protocols.requests import Prompt, Prompts, Spans

logger = logging.getLogger(__name__)


MAX_DRAW_WEIGHT = 1e9  # of a line or alternative, and of all together
SHOWN = 12  # maximum number of draws that are logged
# a key neither begins nor ends with white space or _, but may contain single underscores
_WILDCARD = re.compile(r"\\__|__(?![\s_])((?:[^_\n]|_(?!_))++)(?<!\s)__")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")  # a weight after a colon
# characters that file names cannot contain on every system
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:*?\"<>|]")


@dataclass(frozen=True)
class Lines:
    """Lines of a wildcard file to choose from, with their line numbers and cumulative weights."""

    path: Path
    texts: tuple[str, ...]
    numbers: tuple[int, ...]
    cumulative_weights: tuple[float, ...]


@dataclass
class Drawing:
    """Draw the random parts, wildcards and alternatives, in all prompts of one video."""

    options: PromptOptions
    random: Random
    files: dict[str, Lines] = field(default_factory=dict)  # wildcard files that were read, by key
    drawn: list[tuple[str, str]] = field(default_factory=list)  # (pattern, choice) in the current text
    num_characters: int = 0  # number of drawn characters in the current text

    def expand(self, text: str, prompt_name: str) -> str:
        """Return a text with all random parts drawn.

        Args:
            text: The text.
            prompt_name: Name of the text in error messages.

        Raises:
            OptionError: If a wildcard has no file, points outside the folder, or includes itself.
        """
        self.drawn = []
        self.num_characters = 0
        return self._expand(text, prompt_name, ())

    def _expand(self, text: str, prompt_name: str, enclosing_wildcards: tuple[str, ...]) -> str:
        """Draw a text's alternatives and wildcards; `enclosing_wildcards` are currently being expanded."""
        if self.options.prompt_alternatives:
            text = select_alternatives(text, lambda weights: self._choose(sum_weights(weights, prompt_name)))
        if self.options.prompt_wildcards is None:
            return unescape(text)
        pieces = []
        position = 0
        for match in _WILDCARD.finditer(text):
            key = match[1]
            pieces.append(self._unescape_plain(text[position : match.start()]))
            pieces.append("__" if key is None else self._draw(key, prompt_name, enclosing_wildcards))
            position = match.end()
        return "".join([*pieces, self._unescape_plain(text[position:])])

    def _unescape_plain(self, text: str) -> str:
        """Unescape text outside of wildcards; if alternatives are off, keep the backslashes."""
        return unescape(text) if self.options.prompt_alternatives else text

    def _draw(self, key: str, prompt_name: str, enclosing_wildcards: tuple[str, ...]) -> str:
        """Return a random line of a wildcard, in which nested wildcards are drawn, too."""
        # reject wildcards that include themselves, and too many draws
        # Raise OptionError if wildcards include each other endlessly or draw too many lines
        if len(enclosing_wildcards) == MAX_WILDCARD_ROUNDS:
            chain = " -> ".join(f"__{shorten(name, 40)}__" for name in (*enclosing_wildcards[:4], key))
            raise OptionError(
                f"--prompt_wildcards: {prompt_name} is drawn by wildcards that draw each other more than "
                f"{MAX_WILDCARD_ROUNDS} times ({chain} ...). Remove the wildcard that leads back from its "
                "file"
            )
        if len(self.drawn) == MAX_WILDCARD_DRAWS:
            raise OptionError(
                f"--prompt_wildcards: {prompt_name} draws line number {MAX_WILDCARD_DRAWS + 1:,} of a prompt"
            )
        lines = self._read_lines(key, prompt_name)
        index = self._choose(lines.cumulative_weights)
        line = lines.texts[index]
        self.drawn.append((f"__{key}__", line))
        self.num_characters += len(line)
        if self.num_characters > MAX_WILDCARD_CHARACTERS:
            raise OptionError(
                f"--prompt_wildcards: {prompt_name} becomes longer than {MAX_WILDCARD_CHARACTERS >> 20} "
                "million characters. Draw fewer or shorter lines"
            )
        return self._expand(line, f"{lines.path}, line {lines.numbers[index]}", (*enclosing_wildcards, key))

    def _read_lines(self, key: str, prompt_name: str) -> Lines:
        """Return a wildcard's choices; its file is read only once."""
        if key not in self.files:
            folder = self.options.prompt_wildcards
            assert folder is not None
            path = find_wildcard_file(folder, key, prompt_name)
            self.files[key] = read_wildcard_lines(path, prompt_name)
        return self.files[key]

    def _choose(self, cumulative_weights: Sequence[float]) -> int:
        """Draw an index with the given weights."""
        total = cumulative_weights[-1]
        index = bisect.bisect_right(cumulative_weights, self.random.random() * total)
        # the product may be rounded up to the total, which lies beyond the last index
        return min(index, bisect.bisect_left(cumulative_weights, total))


def sum_weights(weights: Sequence[float], prompt_name: str) -> tuple[float, ...]:
    """Return the cumulative sums of weights.

    Raises:
        OptionError: If their sum is 0 or above MAX_DRAW_WEIGHT.
    """
    cumulative_weights = tuple(itertools.accumulate(weights))
    if not 0 < cumulative_weights[-1] <= MAX_DRAW_WEIGHT:
        raise OptionError(
            f"{prompt_name}: the weights of the texts to draw from add up to {cumulative_weights[-1]:g}. "
            f"Give one of them more than 0, and all together at most {MAX_DRAW_WEIGHT:g}"
        )
    return cumulative_weights


def expand_texts(texts: Mapping[str, str | None], options: PromptOptions, seed: int) -> dict[str, str | None]:
    """Draw the random parts of a video's prompts and log them; return the prompts by option.

    Raises:
        OptionError: If a wildcard has no file, points outside the folder, or includes itself.
    """
    drawing = Drawing(options, Random(seed))
    expanded = {}
    for name, text in texts.items():
        expanded[name] = text if text is None else drawing.expand(text, f"--{name}")
        if expanded[name] != text:
            result = shorten(expanded[name] or "", 1000)
            logger.info("--%s by the seed %d: %s%s", name, seed, result, _describe_draws(drawing.drawn))
    return expanded


def _describe_draws(draws: Sequence[tuple[str, str]]) -> str:
    """Format random draws for the log, such as " (__a__ = x, __b__ = y and 3 more)"; "" for no draws."""
    if not draws:
        return ""
    shown = [f"{key} = {shorten(line, 60)}" for key, line in draws[:SHOWN]]
    num_left = len(draws) - len(shown)
    left = f" and {num_left} more" if num_left else ""
    return f" ({', '.join(shown)}{left})"


def find_wildcard_file(folder: Path, key: str, prompt_name: str) -> Path:
    """Return the text file of a wildcard, named by `key`, such as animals/birds.

    Files outside the folder are rejected, even if a link in the folder leads to them.

    Raises:
        OptionError: If there is no such file.
    """
    wildcard = f"__{shorten(key, 80)}__"
    path_parts = key.split("/")
    if _FORBIDDEN.search(key) or any(part.strip() in {"", ".", ".."} for part in path_parts):
        raise OptionError(
            f"{prompt_name}: {wildcard} does not name a file in --prompt_wildcards {folder}. Write the "
            "file's name without .txt, and folders below that one with /: __animals/birds__. For a plain __ "
            "write \\__"
        )
    path = folder.joinpath(*path_parts[:-1], f"{path_parts[-1]}.txt")
    try:
        real_path = path.resolve(strict=True)
        real_folder = folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # links in a circle raise a RuntimeError
        raise OptionError(
            f"{prompt_name}: {wildcard} needs the file {shorten(str(path), 300)}, which does not exist. "
            "Write it, or \\__ for a plain __"
        ) from None
    if not real_path.is_relative_to(real_folder):
        raise OptionError(
            f"{prompt_name}: {wildcard} is a link that leads out of --prompt_wildcards {folder}"
        )
    return path


def read_wildcard_lines(path: Path, prompt_name: str) -> Lines:
    """Return the lines of a wildcard file with their weights and line numbers.

    `prompt_name` names the prompt that contains the wildcard, for messages.

    Raises:
        OptionError: If the file has no lines or cannot be read.
    """
    texts, weights, numbers = [], [], []
    content = _read_content(path, prompt_name)
    for number, line in enumerate(content.split("\n"), 1):
        # empty lines and comments are not choices
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        text, weight = _parse_line(line)
        if not 0 <= weight <= MAX_DRAW_WEIGHT:
            raise OptionError(
                f"{path}, line {number}: {weight:g} is not a weight. Use 0 to {MAX_DRAW_WEIGHT:g}"
            )
        texts.append(text)
        weights.append(weight)
        numbers.append(number)
    if not texts:
        raise OptionError(f"{prompt_name}: {path} has no line to draw. Write one text on each line")
    return Lines(path, tuple(texts), tuple(numbers), sum_weights(weights, str(path)))


def _read_content(path: Path, prompt_name: str) -> str:
    """Return the text of a file. Raises OptionError if it cannot be read or is not valid UTF-8 text."""
    try:
        content = read_text(path)
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{prompt_name}: {path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as "
            "UTF-8"
        ) from None
    except OSError as error:
        raise OptionError(f"{prompt_name}: {path}: {error.strerror}") from None
    character = bad_character(content)
    if character is not None:
        raise OptionError(f"{prompt_name}: {path} contains {character}")
    return content


def _parse_line(line: str) -> tuple[str, float]:
    """Split a wildcard line into its text, without quotation marks, and its weight (default: 1)."""
    text = line.strip()
    weight = 1.0
    before, colon, number = text.rpartition(":")
    number = number.strip()
    if colon and NUMBER.fullmatch(number):
        text = before.strip()
        weight = float(number[:40])
    if len(text) > 1 and text[0] == text[-1] == '"':  # quotation marks protect a number after a colon
        text = text[1:-1]
    return text, weight


# Alternatives in a prompt: `a {red|blue} car` becomes one of the two, `{3::red|blue}` red three times as
# often.
#
# Groups may be nested; nothing is drawn inside an alternative that is not chosen. Braces without a `|`
# between them, and a brace without its partner, are plain text; so is what follows a backslash.
_BRACES_AND_BARS = re.compile(r"\\[{}|]|[{}|]")
_WEIGHT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)::")
_ESCAPED = re.compile(r"\\([{}|])")

# weights of the alternatives -> index of the chosen one
Choose = Callable[[Sequence[float]], int]


@dataclass
class _Group:
    """Positions of a group's braces, and of the bars that separate its alternatives."""

    start: int
    end: int = 0
    bar_positions: list[int] = field(default_factory=list)


class _Alternative(NamedTuple):
    """Character span of one alternative in the text, excluding its weight."""

    start: int
    end: int
    weight: float


def select_alternatives(text: str, choose: Choose) -> str:
    """Return a text with one alternative chosen in each group {a|b}; `choose` picks by their weights.

    Escaped characters remain escaped until `unescape`.

    Raises:
        OptionError: If groups are nested more than MAX_NESTED deep, or raised by `choose`.
    """
    groups = _find_groups(text)
    if not groups:
        return text
    # Raise OptionError if groups {a|b} are nested too deeply
    enclosing: list[int] = []  # ends of the groups that contain the current one, itself included
    for group in groups:
        while enclosing and enclosing[-1] < group.start:
            enclosing.pop()
        enclosing.append(group.end)
        if len(enclosing) > MAX_NESTED:
            raise OptionError(
                f"--prompt_alternatives: braces are nested more than {MAX_NESTED} deep. Write the "
                "alternatives into files and use --prompt_wildcards"
            )
    return _expand_groups(text, groups, choose, start=0, end=len(text))


def _expand_groups(text: str, groups: Sequence[_Group], choose: Choose, start: int, end: int) -> str:
    """Return the text from `start` to `end` with one alternative chosen in each group."""
    # Groups inside the chosen alternatives are expanded, too. `groups` contains all groups of the whole text,
    # sorted by start.
    pieces: list[str] = []
    position = start
    while True:
        # the first group from here on: those inside an expanded group start before its end
        index = bisect.bisect_left(groups, position, key=lambda group: group.start)
        if index == len(groups) or groups[index].start >= end:
            return "".join([*pieces, text[position:end]])
        group = groups[index]
        alternatives = _list_alternatives(text, group)
        chosen = alternatives[choose([alternative.weight for alternative in alternatives])]
        expanded = _expand_groups(text, groups, choose, start=chosen.start, end=chosen.end)
        pieces += [text[position : group.start], expanded.strip()]
        position = group.end + 1


def _list_alternatives(text: str, group: _Group) -> list[_Alternative]:
    """Return the alternatives of a brace group such as `{a|2::b}`, in order, with their weights."""
    alternatives = []
    for border, end in pairwise([group.start, *group.bar_positions, group.end]):
        match = _WEIGHT.match(text, border + 1, end)
        if match is None:
            alternatives.append(_Alternative(border + 1, end, weight=1.0))
        else:
            alternatives.append(_Alternative(match.end(), end, weight=float(match[1][:40])))
    return alternatives


def _find_groups(text: str) -> list[_Group]:
    """Return the groups {a|b} that have alternatives, nested ones too, sorted by their start."""
    open_groups: list[_Group] = []  # innermost last
    groups: list[_Group] = []
    for match in _BRACES_AND_BARS.finditer(text):
        if match[0] == "{":
            open_groups.append(_Group(match.start()))
        elif match[0] == "|" and open_groups:
            open_groups[-1].bar_positions.append(match.start())
        elif match[0] == "}" and open_groups:
            group = open_groups.pop()
            group.end = match.start()
            # braces without a bar are ordinary text
            if group.bar_positions:
                groups.append(group)
    return sorted(groups, key=lambda group: group.start)


def unescape(text: str) -> str:
    """Remove the backslashes before escaped characters."""
    return _ESCAPED.sub(r"\1", text)


DEFAULT = 1.1  # weight of (text)
MAX_WEIGHT = 100.0  # larger weights are typing mistakes, and would overflow float16
_PARENTHESES = re.compile(r"\\[()]|[()]")


class _OpenParenthesis(NamedTuple):
    """An opening parenthesis that is still unclosed."""

    piece_index: int
    position: int  # in the text without weight marks


def parse_weights(text: str) -> tuple[str, Spans]:
    """Return a text without weight syntax "(words:1.2)", and its weighted parts as (start, end, weight).

    Positions are characters of the returned text. Parts neither start nor end with white space; parts of
    weight 1 are omitted. Weights do not nest, so only the innermost open parenthesis is remembered. Runs in
    linear time.

    Raises:
        OptionError: If a weight is beyond MAX_WEIGHT.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int, float]] = []
    length = 0  # total length of the pieces
    position = 0  # in the original text
    open_parenthesis: _OpenParenthesis | None = None
    for match in _PARENTHESES.finditer(text):
        pieces.append(text[position : match.start()])
        length += match.start() - position
        position = match.end()
        if match[0] == ")" and open_parenthesis is not None:
            piece_index, start = open_parenthesis
            open_parenthesis = None
            weighted = _read_weight("".join(pieces[piece_index + 1 :]))
            if weighted is not None:  # replace the parentheses and the weight by the plain text
                part, weight = weighted
                pieces[piece_index:] = [part]
                length = start + len(part)
                if weight != 1:
                    # (start, end, weight) of a part that begins at `start`, without its outer white space
                    visible_start = start + len(part) - len(part.lstrip())
                    spans.append((visible_start, visible_start + len(part.strip()), weight))
                continue
        if match[0] == "(":
            open_parenthesis = _OpenParenthesis(piece_index=len(pieces), position=length)
        pieces.append(match[0][-1])  # an escaped parenthesis loses its backslash
        length += 1
    return "".join(pieces) + text[position:], tuple(spans)


def _read_weight(inside: str) -> tuple[str, float] | None:
    """Return the text inside parentheses and its weight; None if the parentheses are plain text."""
    text, colon, number = inside.rpartition(":")
    if not colon:
        return (inside, DEFAULT) if inside.strip() else None
    if not text.strip() or not NUMBER.fullmatch(number):
        return None
    weight = float(number) if len(number) < 40 else float("inf")
    if abs(weight) > MAX_WEIGHT:
        raise OptionError(
            f"--prompt_weighting: ({shorten(inside, 60)}) has a weight beyond {MAX_WEIGHT:g}; 0.5 to 1.5 are "
            "usual. For a text with parentheses write \\( and \\)"
        )
    return text, weight


def weigh_all(by_section: Mapping[int, Prompts]) -> dict[int, Prompts]:
    """Parse weights such as `(text:1.3)` in all prompts; return the prompts with plain text and weights."""

    def weigh_optional(prompt: Prompt | None) -> Prompt | None:
        return None if prompt is None else _parse_prompt_weights(prompt)

    weighted = {}
    for section, prompts in by_section.items():
        weighted[section] = Prompts(
            _parse_prompt_weights(prompts.positive),
            weigh_optional(prompts.negative),
            weigh_optional(prompts.blank),
            weigh_optional(prompts.nag),
        )
    return weighted


def _parse_prompt_weights(prompt: Prompt) -> Prompt:
    """Parse the weights in a prompt; weights in `prompt_2`, which CLIP pools to one vector, are removed."""
    text, spans = parse_weights(prompt.text)
    second = None if prompt.prompt_2 is None else parse_weights(prompt.prompt_2)[0]
    return replace(prompt, text=text, weighted_spans=spans, prompt_2=second)
