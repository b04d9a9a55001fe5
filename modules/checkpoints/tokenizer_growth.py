"""Read tokenizers' own formats: by how much a normaliser may lengthen a text (a small file could turn a
prompt into terabytes), and the characters of each piece of a text.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from modules.varints import read_varint

_PIECE = 1 << 3 | 2  # the key of a piece of the vocabulary, field 1
# characters for one; those of the models here: 2 (CLIP), 18 (umT5, by Unicode's own tables)
MOST_GROWTH = 256


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the normaliser of a tokenizer could make a text longer by more than MOST_GROWTH
    times.
    """
    if tokenizer.normalizer is not None:
        _check(_growth(json.loads(tokenizer.normalizer.__getstate__())))


def check_sentencepiece(model: bytes) -> None:
    """The same for a SentencePiece model.

    Source: sentencepiece_model.proto, ModelProto and NormalizerSpec.
    """
    for specification in _entries(model, 3):
        for charsmap in _entries(specification, 2):
            _check(_growth_of_charsmap(charsmap))


def piece_surfaces(encoded: bytes) -> list[str]:
    """Return the characters of a text that each piece stands for, of a SentencePiece encoding as bytes.

    Of a character's bytes as pieces only the last has it. Source: sentencepiece.proto, SentencePieceText.
    """
    return [b"".join(_entries(piece, 3)).decode("utf-8", "replace") for piece in _entries(encoded, 2)]


def _check(growth: float) -> None:
    if growth > MOST_GROWTH:
        raise ValueError(f"its normaliser makes {growth:.0f} characters of one, {MOST_GROWTH} are the most")


def _growth(normaliser: Mapping[str, Any]) -> float:
    """Characters that one may become, at most; Unicode's own forms and steps that are not known count as
    1.
    """
    match normaliser.get("type"):
        case "Sequence":
            product = 1.0
            for inner in normaliser["normalizers"]:
                product *= _growth(inner)
            return product
        case "Replace":
            pattern = normaliser["pattern"]
            if "String" in pattern:
                return max(1.0, len(normaliser["content"]) / max(1, len(pattern["String"])))
            # a regular expression may match between any two characters
            return 1.0 + len(normaliser["content"])
        case "Prepend":
            return 1.0 + len(normaliser["prepend"])
        case "Precompiled":
            return _growth_of_charsmap(base64.b64decode(normaliser["precompiled_charsmap"]))
    return 1.0


def _growth_of_charsmap(charsmap: bytes) -> float:
    """The longest text in a table of characters: the size of its index, the index, texts that end in NUL."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return float(max(map(len, texts.split(b"\0"))))


def _entries(message: bytes, wanted: int) -> Iterator[bytes]:
    """The texts and inner messages of a field.

    Source: protobuf.dev, "Encoding". Raises ValueError if it is damaged.
    """
    place, last = 0, len(message) - 1
    try:
        while place <= last:
            # 256,000 times in umT5's
            while place < last and message[place] == _PIECE and message[place + 1] < 0x80:
                place += 2 + message[place + 1]
            if place == last + 1:
                return
            key, place = read_varint(message, place)
            match key & 7:
                case 0:
                    _, place = read_varint(message, place)
                case 1:
                    place += 8
                case 2:
                    length, place = read_varint(message, place)
                    if key >> 3 == wanted:
                        yield message[place : place + length]
                    place += length
                case 5:
                    place += 4
                case kind:
                    raise ValueError(f"a field of the unknown kind {kind}")
    except IndexError:
        raise ValueError("it ends inside a field") from None
