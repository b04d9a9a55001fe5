"""Turn a model's answer, or an edited caption, into one line, with words put into it."""

import re

from data_tools.captions.options import WordingOptions
from dataset.sources.captions import add_trigger
from modules.answers import take_answer
from modules.text_files import MAX_CAPTION_BYTES

# what servers and tokenizers leave in an answer: <|im_end|>, </s>, <end_of_turn>
_TOKENS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos|end_of_turn|end_of_utterance|end_of_text)>"
)
_MOST_CHARACTERS = MAX_CAPTION_BYTES // 4  # in UTF-8 a character has up to four bytes


def clean_answer(answer: str) -> str:
    """Return the caption in a model's answer: one line without thoughts, quotation marks and special tokens.

    Empty if there is none.
    """
    return take_answer(_TOKENS.sub(" ", answer), _MOST_CHARACTERS)


def reword(caption: str, wording: WordingOptions) -> str:
    """Return "prefix trigger, caption suffix" after replacing, as the keys of a dataset table do.

    Words already in the caption are not put in again.
    """
    for old, new in wording.replace:
        caption = caption.replace(old, new)
    for pattern, new in wording.replace_regex:
        caption = re.sub(pattern, new, caption)
    caption = add_trigger(caption.strip(), wording.trigger_word.strip())
    prefix, suffix = wording.caption_prefix.strip(), wording.caption_suffix.strip()
    if prefix and not caption.startswith(prefix):
        caption = f"{prefix} {caption}"
    if suffix and not caption.endswith(suffix):
        caption = f"{caption} {suffix}"
    return caption


def reword_lines(caption: str, wording: WordingOptions, is_several: bool) -> str:
    """Reword a caption that is there. is_several: each line is a caption (multi_caption)."""
    if not is_several:
        return reword(caption, wording)
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    return "\n".join(line for line in (reword(line, wording) for line in lines) if line)
