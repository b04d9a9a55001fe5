"""Chunks of tokens, and the tokenizers of the text encoders.

Tokenizers are found in --tokenizer_cache_dir, in the checkpoint's folder, or on the hub.

OpenCLIP and CLIP-L have the same vocabulary, so the files of either serve for both. They differ in padding:
CLIP-L pads with its end token, OpenCLIP with token 0 ("!" in its released settings). This is not read from
the files, because some copies of OpenCLIP's files lack it.
"""

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoints.tokenizers import TokenizerFiles
from encoders.clip_checkpoints import clip_tokenizer_files
from encoders.clip_l import ClipWords, load_clip_words
from encoders.text_encoder import find_merges
from modules.atomic_write import make_folder, write_bytes
from modules.errors import CheckpointError, OptionError

logger = logging.getLogger(__name__)

OPTION = "--tokenizer_cache_dir"
CLIP_L = "openai_clip-vit-large-patch14"
OPEN_CLIP = ("laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", "stabilityai_stable-diffusion-2")
OPEN_CLIP_PAD = 0


def load_tokenizers(cache: Path | None, checkpoint: Path, are_open_clip: Sequence[bool]) -> list[ClipWords]:
    """Load the tokenizer of each text encoder.

    Args:
        cache: Folder of --tokenizer_cache_dir.
        checkpoint: File or folder of the checkpoint.
        are_open_clip: Whether each text encoder is OpenCLIP; otherwise it is CLIP-L.

    Raises:
        OptionError: If --tokenizer_cache_dir names a file.
        CheckpointError: If a tokenizer is missing or cannot be read.
    """
    loaded: dict[Path, ClipWords] = {}
    tokenizers = []
    for source, file in fetch_tokenizer_files(cache, checkpoint, are_open_clip):
        if file not in loaded:
            logger.info("tokenizer: %s", file)
            loaded[file] = load_clip_words(source, file)
        tokenizers.append(loaded[file])
    return tokenizers


def fetch_tokenizer_files(
    cache: Path | None, checkpoint: Path, are_open_clip: Sequence[bool]
) -> list[tuple[TokenizerFiles, Path]]:
    """Find or download each text encoder's tokenizer; return its description and its file.

    Args:
        cache: Folder of --tokenizer_cache_dir.
        checkpoint: File or folder of the checkpoint.
        are_open_clip: Whether each text encoder is OpenCLIP; otherwise it is CLIP-L.

    Raises:
        OptionError: If --tokenizer_cache_dir names a file.
        CheckpointError: If a tokenizer is missing and cannot be downloaded.
    """
    fetched: list[tuple[TokenizerFiles, Path]] = []
    for source, file in find_tokenizer_files(cache, checkpoint, are_open_clip):
        if file is None:
            # both encoders share the first one's tokenizer
            file = fetched[0][1] if fetched else _download(source, cache, checkpoint)
        fetched.append((source, file))
    return fetched


def find_tokenizer_files(
    cache: Path | None, checkpoint: Path, are_open_clip: Sequence[bool]
) -> list[tuple[TokenizerFiles, Path | None]]:
    """Return each text encoder's tokenizer: its description, and its file or None if it is missing.

    Args:
        cache: Folder of --tokenizer_cache_dir.
        checkpoint: File or folder of the checkpoint.
        are_open_clip: Whether each text encoder is OpenCLIP; otherwise it is CLIP-L.

    Raises:
        OptionError: If --tokenizer_cache_dir names a file.
    """
    if cache is not None and cache.exists() and not cache.is_dir():
        raise OptionError(f"{OPTION} {cache}: it is not a folder. Pass the folder that contains {CLIP_L}")
    folders = [checkpoint] if cache is None or not cache.is_dir() else [cache, checkpoint]
    sources: list[tuple[TokenizerFiles, Path | None]] = []
    for index, is_open_clip in enumerate(are_open_clip):
        cache_names = OPEN_CLIP if is_open_clip else (CLIP_L,)
        diffusers_name = "tokenizer" if index == 0 else f"tokenizer_{index + 1}"
        # subfolders in search order; "." is the folder itself
        subfolders = (diffusers_name, *cache_names, "tokenizer", CLIP_L, "clip_l", ".")
        description = clip_tokenizer_files(OPTION, subfolders)
        sources.append((description, _find_in(folders, description)))
    return sources


def _find_in(folders: Sequence[Path], files: TokenizerFiles) -> Path | None:
    """Return the first tokenizer file inside or next to one of these paths; None if none is found."""
    for parent in folders:
        file = files.find(None, parent)
        if file is not None:
            return file
    return None


def keep_tokenizer(source: Path, target: Path, are_open_clip: Sequence[bool]) -> None:
    """Copy the tokenizer of a source checkpoint next to a trained file, if the trained file lacks one.

    If the source has several, only the first one is copied, because all have the same vocabulary.

    Args:
        source: File or folder of the source checkpoint.
        target: Single file that was trained from `source`.
        are_open_clip: Whether each text encoder is OpenCLIP.

    Raises:
        OutputError: If the tokenizer cannot be written.
    """
    if any(file is not None for _, file in find_tokenizer_files(None, target, are_open_clip)):
        return
    source_tokenizers = [
        (files, file) for files, file in find_tokenizer_files(None, source, are_open_clip) if file
    ]
    if not source_tokenizers:
        return
    files, file = source_tokenizers[0]
    folder = target.parent / CLIP_L
    make_folder(folder, "--output_dir")
    merges = find_merges(file)
    # merges.txt first: without vocab.json, an interrupted copy does not count as a tokenizer
    for part in (file,) if merges is None else (merges, file):
        write_bytes(folder / part.name, files.read_bytes(part))
    logger.info("The tokenizer of %s was copied to %s, for the trained checkpoints", source, folder)


def check_vocabulary(tokenizer: ClipWords, rows: int, checkpoint: Path) -> None:
    """Raise CheckpointError if the tokenizer has more tokens than the text encoder has embedding rows."""
    last = max(tokenizer.start, tokenizer.end)
    if last >= rows:
        raise CheckpointError(
            f"{checkpoint}: its text encoder has {rows} token embeddings, but its tokenizer has token IDs "
            f"up to {last}. Pass the matching tokenizer to {OPTION}.",
            checkpoint,
        )


def _download(files: TokenizerFiles, cache: Path | None, checkpoint: Path) -> Path:
    """Download the tokenizer; keep a copy in --tokenizer_cache_dir, if given, for offline runs."""
    try:
        file = files.download(checkpoint)
    except CheckpointError as error:
        in_cache = f" in {cache} or" if cache is not None else ""
        raise CheckpointError(
            f"no tokenizer for {checkpoint}: there is none{in_cache} next to it, and {files.repository} "
            "cannot be downloaded from the hub.\n  Put vocab.json and merges.txt, or tokenizer.json, of that "
            f"repository into a folder {CLIP_L} and pass the folder that contains it to {OPTION}."
        ) from error
    if cache is None:
        return file
    copy = cache / CLIP_L / file.name
    make_folder(copy.parent, OPTION)
    write_bytes(copy, files.read_bytes(file))
    logger.info("The tokenizer was downloaded and saved in %s", copy.parent)
    return copy


# Cut the tokens of a text into chunks, which a text encoder reads one by one.
#
# A chunk is up to 75 tokens, between the start and the end token. When the states of several chunks are
# joined, the start and end states between them are dropped: n chunks give 75 n + 2 states. Captions of 150
# and 225 tokens are laid out like this in training too.
# Read the weights in a prompt: `a (red:1.4) [old] car`, and where BREAK begins a new chunk of tokens.
#
# `(x)` weighs 1.1, `[x]` 1 / 1.1, `(x:1.3)` 1.3; nested weights multiply. `\( \) \[ \] \\` are the
# characters themselves. Unclosed brackets are closed at the end; unmatched closing
# brackets are plain text. Round and square brackets are matched separately.
DEFAULT_WEIGHTS = {"(": 1.1, "[": 1 / 1.1}  # weights of (x) and [x]
MAX_WEIGHT = 1000.0  # larger products would overflow float16
_BRACKETS_AND_BREAK = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<bracket>[()\[\]])"
    r"|:[ \t]*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))[ \t]*\)"
    r"|(?P<chunk>\bBREAK\b)"
)


@dataclass(frozen=True)
class WeightedText:
    """Text with one weight for all its tokens."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False  # whether BREAK precedes it


@dataclass
class _Bracket:
    """A bracket in a prompt with weights."""

    kind: str  # "(" or "["
    weight: float  # weight of an opening bracket, which the closing bracket may set
    closes: bool = False


BREAK = None
_PromptItem = str | _Bracket | None  # a text, a bracket, or BREAK


def parse_weights(text: str) -> tuple[WeightedText, ...]:
    """Split a prompt into weighted parts, without brackets and without empty parts.

    Adjacent parts of equal weight are joined, so a text without brackets is one part. Runs in linear time
    and accepts any text.
    """
    parts: list[WeightedText] = []
    # products of the weights of the open brackets, from the outermost inward
    products = {"(": [1.0], "[": [1.0]}
    begins_chunk = False
    for item in _split_at_brackets(text):
        if item is BREAK:
            begins_chunk = True
        elif isinstance(item, _Bracket):
            open_products = products[item.kind]
            if item.closes:
                open_products.pop()
            else:
                open_products.append(_bounded(open_products[-1] * item.weight))
        elif item:  # non-empty text
            weight = _bounded(products["("][-1] * products["["][-1])
            if parts and parts[-1].weight == weight and not begins_chunk:
                parts[-1] = replace(parts[-1], text=parts[-1].text + item)
            else:
                parts.append(WeightedText(item, weight, begins_chunk))
            begins_chunk = False
    return tuple(parts)


def _split_at_brackets(text: str) -> list[_PromptItem]:
    """Split a prompt into plain text, brackets with their weights, and BREAKs, in their order."""
    # The weight of an opening bracket is only known at its closing bracket, as in `(x:1.3)`.
    items: list[_PromptItem] = []
    open_brackets: dict[str, list[_Bracket]] = {"(": [], "[": []}
    position = 0
    for match in _BRACKETS_AND_BREAK.finditer(text):
        items.append(text[position : match.start()])
        position = match.end()
        bracket_sign = match["bracket"]  # None for `:1.3)`, which closes a round bracket
        kind = "[" if bracket_sign in ("[", "]") else "("
        if match["chunk"]:
            items.append(BREAK)
        elif bracket_sign in ("(", "["):
            opening = _Bracket(kind, DEFAULT_WEIGHTS[kind])
            open_brackets[kind].append(opening)
            items.append(opening)
        elif match["escaped"] or not open_brackets[kind]:  # plain text: escaped, or closes nothing
            items.append(match["escaped"] or match[0])
        else:
            opening = open_brackets[kind].pop()
            if match["number"]:
                # float() of too many digits is infinite, which is not a weight
                opening.weight = _bounded(float(match["number"]))
            items.append(_Bracket(kind, 1.0, closes=True))
    items.append(text[position:])
    return items


def _bounded(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


CHUNK_SIZE = 75  # tokens of a chunk
Tokenize = Callable[[str], list[int]]  # any number of ids, without start and end token


@dataclass(frozen=True)
class Chunk:
    """Up to 75 token ids, and one weight per token."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def fill_chunk(ids: Sequence[int], *, start: int, end: int, pad: int) -> list[int]:
    """Return a chunk's 77 token ids: the start token, up to 75 ids, the end token and padding."""
    return [start, *ids, end, *[pad] * (CHUNK_SIZE - len(ids))]


def cut_into_chunks(parts: Sequence[WeightedText], tokenize: Tokenize) -> list[Chunk]:
    """Return the chunks of a text, at least one. BREAK begins a new one, unless one has just begun."""
    chunks: list[Chunk] = []
    ids: list[int] = []  # of the current chunk
    weights: list[float] = []
    for part in parts:
        if part.begins_chunk and ids:
            chunks.append(Chunk(tuple(ids), tuple(weights)))
            ids, weights = [], []
        for token in tokenize(part.text):
            if len(ids) == CHUNK_SIZE:
                chunks.append(Chunk(tuple(ids), tuple(weights)))
                ids, weights = [], []
            ids.append(token)
            weights.append(part.weight)
    if ids or not chunks:  # no empty chunk if only white space follows the last BREAK
        chunks.append(Chunk(tuple(ids), tuple(weights)))
    return chunks


def find_cut_off_text(parts: Sequence[WeightedText], tokenize: Tokenize, maximum: int) -> str:
    """Return the words at the end of a text that exceed `maximum` chunks. This is slow."""
    words: list[WeightedText] = []
    begins_chunk = False
    for part in parts:
        begins_chunk = begins_chunk or part.begins_chunk  # a part may be blank
        for word in part.text.split():
            words.append(WeightedText(word, begins_chunk=begins_chunk))
            begins_chunk = False
    sizes = range(1, len(words) + 1)
    fits = bisect_right(sizes, maximum, key=lambda size: len(cut_into_chunks(words[:size], tokenize)))
    return " ".join(word.text for word in words[fits:])
