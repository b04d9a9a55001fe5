"""Guess the encoding of a text file that is not UTF-8. Standard library only.

The guess names the encoding in messages and converts the file. Each encoding that decodes the bytes is scored
by how usual its characters are in a text: letters in words of their own script, and the most
frequent letters and signs of the languages that use the encoding.
"""

import codecs
import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Python's name -> what people call it; of equal scores the first counts
NAMES = {
    "utf-8": "damaged UTF-8",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16 (big endian)",
    "utf-32": "UTF-32",
    "cp1252": "Windows-1252 (Western European)",
    "cp1250": "Windows-1250 (Central European)",
    "cp1251": "Windows-1251 (Cyrillic)",
    "koi8_r": "KOI8-R (Cyrillic)",
    "cp1253": "Windows-1253 (Greek)",
    "cp932": "Shift-JIS (Japanese)",
    "euc_jp": "EUC-JP (Japanese)",
    "gb18030": "GBK (Chinese)",
    "big5": "Big5 (Chinese)",
    "cp949": "EUC-KR (Korean)",
}
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# frequent letters and signs of the languages of each encoding, most of them from the words of captions
_FREQUENT = {
    "cp1252": "éèàçêäöüßñáíóúåæøâîôûëïãõ",
    "cp1250": "ąćęłńóśźżčďěňřšťůžýáíéúőű",
    "cp1251": "оеаинтсрвлкмдпуыяьзбгй",
    "koi8_r": "оеаинтсрвлкмдпуыяьзбгй",
    "cp1253": "αοιετσνηυρπκμλςάόίέήύώ",
    "cp949": "이다는의에을가고하한로은도를지서인사기자정어대리나시과라해있수그일아장부원성제보전주상조"
    "국우동구마들것선만비여화빨간파란노란색검흰여남소년녀강고양개걷달고앉위래안옆집길산바다꽃나무",
    "gb18030": "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能"
    "下过子说种面而方后多定行学法所得十三之进着等部度家里如水高自二理起小物现两体当使点从本去把性好开它合还其些前外天四日事平形相全间样与关各重新内正心"
    "看红绿蓝黄黑白色猫狗女男孩走跑站坐穿衣服头发眼睛手车路树花草山海边房子城市街道光夜雨雪风画面镜",
    "big5": "的一是在不了有和人這中大為上個國我以要他時來用們生到作地於出就分對成會可主發年動同工也能"
    "下過子說種面而方後多定行學法所得十三之進著等部度家裡如水高自二理起小物現兩體當使點從本去把性好開它合還其些前外天四日事平形相全間樣與關各重新內正心"
    "看紅綠藍黃黑白色貓狗女男孩走跑站坐穿衣服頭髮眼睛手車路樹花草山海邊房子城市街道光夜雨雪風畫面鏡",
}
_SCRIPTS = {"cp1251": "CYRILLIC", "koi8_r": "CYRILLIC", "cp1253": "GREEK"}  # others: Latin, East Asian
_PUNCTUATION = set("“”‘’„–—…•«»¿¡€°、。，！？「」『』（）：；・ー～　")
MIN_PLAUSIBLE = 0.6  # minimum fraction of letters, spaces and punctuation
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MAX_SCORED = 5000  # maximum characters of a file that are scored
_MIN_SURE_SCORE = 0.75  # minimum score for converting without asking
_MIN_LEAD = 0.4  # minimum lead over the next guess per character,
_MIN_TOTAL_LEAD = 1.5  # or in the sum over all characters


@dataclass(frozen=True)
class EncodingGuess:
    """The probable encoding of a file's bytes, and the text decoded with it."""

    encoding: str  # Python's name
    text: str
    is_sure: bool

    @property
    def name(self) -> str:
        """Human-readable name of the encoding, such as "Windows-1252"."""
        return NAMES.get(self.encoding, self.encoding)


def guess_encoding(content: bytes) -> EncodingGuess | None:
    """Return the most probable encoding of bytes that are not UTF-8; None if they are probably not text."""
    utf_with_mark = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), None)
    if utf_with_mark is not None or b"\0" in content:
        return _guess_utf16_or_32(content, utf_with_mark)
    if _CONTROL.search(content):
        return None
    as_utf8 = content.decode("utf-8", "replace")
    num_invalid = as_utf8.count("\ufffd")
    if _count_beyond_ascii(as_utf8) - num_invalid > 3 * num_invalid:  # UTF-8 with a few damaged bytes
        return EncodingGuess("utf-8", as_utf8, is_sure=False)
    # the text in every encoding that can decode the bytes, most plausible first
    scored = []
    for encoding in NAMES:
        text = None if encoding.startswith("utf") else _decode(content, encoding)
        if text is not None:
            scored.append(_ScoredText(_score_text(text, encoding), encoding, text))
    ranked = sorted(scored, key=lambda guess: -guess.score)  # stable: equal scores keep the order of NAMES
    if not ranked or ranked[0].score < 0:
        return None
    best = ranked[0]
    is_sure = best.score >= _MIN_SURE_SCORE and _leads_clearly(ranked)
    return EncodingGuess(best.encoding, best.text, is_sure)


def _leads_clearly(ranked: "Sequence[_ScoredText]") -> bool:
    """Return whether the best text is much more plausible than the next different text."""
    best = ranked[0]
    second_score = next((scored.score for scored in ranked if scored.text != best.text), -1.0)
    lead = best.score - second_score  # per character beyond ASCII
    return lead >= _MIN_LEAD or lead * _count_beyond_ascii(best.text) >= _MIN_TOTAL_LEAD


class _ScoredText(NamedTuple):
    """A text decoded with one encoding, and a score of how plausible the text is."""

    score: float
    encoding: str
    text: str


def _count_beyond_ascii(text: str) -> int:
    return sum(char > "\x7f" for char in text)


def _guess_utf16_or_32(content: bytes, marked: str | None) -> EncodingGuess | None:
    """Decode the bytes as UTF-16 or UTF-32; return the guess, or None if the text is implausible."""
    # `marked` is the encoding that the byte order mark indicates; None without a mark.
    half = len(content) // 2
    zeros = content[::2].count(0), content[1::2].count(0)
    # without a mark only ASCII is recognized, half of whose bytes are 0
    name = marked or ("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be")
    text = _decode(content, name)
    if text is None or "\0" in text or _measure_characters(text) < MIN_PLAUSIBLE:
        return None
    return EncodingGuess(name, text, is_sure=True) if marked or max(zeros) > MIN_PLAUSIBLE * half else None


def guess_encodings(contents: Sequence[bytes]) -> list[EncodingGuess | None]:
    """Guess the encoding of each file in a group that probably shares one; None for a file that is not text.

    A short text alone says little, so a file with an uncertain encoding gets the most probable encoding of
    all files together, if its bytes can be decoded with it.
    """
    guesses = [guess_encoding(content) for content in contents]
    not_unicode = [
        content for content, guess in zip(contents, guesses, strict=True) if not _is_unicode(guess)
    ]
    if len(not_unicode) < 2:
        return guesses
    joint_guess = guess_encoding(b"\n".join(not_unicode))
    if joint_guess is None or _is_unicode(joint_guess):
        return guesses
    return [
        _prefer_joint_guess(content, guess, joint_guess)
        for content, guess in zip(contents, guesses, strict=True)
    ]


def _prefer_joint_guess(
    content: bytes, guess: EncodingGuess | None, joint_guess: EncodingGuess
) -> EncodingGuess | None:
    """Return the guess for all files together if a file's own guess is uncertain and its bytes allow it."""
    if _is_unicode(guess) or (guess is not None and guess.is_sure):
        return guess
    text = _decode(content, joint_guess.encoding)
    return guess if text is None else EncodingGuess(joint_guess.encoding, text, joint_guess.is_sure)


def _is_unicode(guess: EncodingGuess | None) -> bool:
    return guess is not None and guess.encoding.startswith("utf")


def _decode(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except (UnicodeDecodeError, UnicodeError):
        return None


def _measure_characters(text: str) -> float:
    plausible = sum(
        char.isalnum() or char.isspace() or char in _PUNCTUATION or char < "\x7f" for char in text
    )
    return plausible / max(len(text), 1)


def _score_text(text: str, encoding: str) -> float:
    """Return the plausibility of the non-ASCII characters: 1 and more for real text, below 0 for nonsense."""
    padded = f" {text[:MAX_SCORED]} "
    points = [
        _score_character(padded[index - 1], char, padded[index + 1], encoding)
        for index, char in enumerate(padded[1:-1], 1)
        if char > "\x7f"
    ]
    return sum(points) / max(len(points), 1)


@functools.lru_cache(1 << 16)
def _score_character(before: str, char: str, after: str, encoding: str) -> float:
    """Score how plausible a decoded character is between its neighbors; above 0 means plausible."""
    # Only the order of the scores counts: punctuation, letters and kana are likely, control codes never are.
    if char in _PUNCTUATION:
        return 0.8
    category = unicodedata.category(char)
    if category[0] != "L":  # symbols, control codes, private use
        return -3.0 if category in {"Cc", "Co", "Cn"} else -1.0
    is_frequent = char.lower() in _FREQUENT.get(encoding, "")
    is_kana = "\u3040" <= char <= "\u30ff"
    if is_kana and encoding in {"cp932", "euc_jp"}:
        return 1.5
    if char >= "\uff00":  # half-width and full-width forms: what single bytes look like in Shift-JIS
        return -0.5
    if char >= "\u2e80":  # East Asian scripts
        # Rate an East Asian character: above 0 if it is a common one, else below 0
        # The national standards list common characters first: level 1 of GB 2312, Big5 and JIS X 0208, and
        # the
        # Hangul of KS X 1001. The first bytes of their codes are in the ranges below.
        lead_byte = char.encode(encoding)[0]
        match encoding:
            case "gb18030":  # contains GB 2312
                is_common = 0xB0 <= lead_byte <= 0xD7 and char.encode(encoding)[1] >= 0xA1
            case "big5":
                is_common = 0xA4 <= lead_byte <= 0xC6
            case "cp932":
                is_common = 0x88 <= lead_byte <= 0x97
            case "euc_jp":
                is_common = 0xB0 <= lead_byte <= 0xCF
            case _:
                is_common = 0xB0 <= lead_byte <= 0xC8 and char.encode(encoding)[1] >= 0xA1
        return (0.4 if is_common else -1.0) + (1.0 if is_frequent else 0.0)
    # Score a letter: above 0 if it and its neighbors belong to the script of the encoding
    neighbors = [neighbor for neighbor in (before, after) if neighbor.isalpha()]
    script = _SCRIPTS.get(encoding, "LATIN")
    if any(script not in unicodedata.name(letter, "") for letter in (char, *neighbors)):
        return -1.0
    if char.isupper() and before.isalpha():  # inside a word
        return -1.0 if before.islower() else 0.0
    if encoding == "cp1252" and any(letter > "\x7f" for letter in neighbors):
        return -0.5  # two accents next to each other
    bonus = 0.5 if is_frequent else 0.0
    return bonus + (0.5 if script != "LATIN" or is_frequent else 0.3)
