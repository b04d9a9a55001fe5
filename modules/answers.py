"""Take the text out of a chat model's answer. Standard library only."""

import re

from modules.control_codes import drop_control_codes
from modules.limits import MAX_ANSWER_CHARACTERS

# what models that think aloud say before their answer; a thought may have no end
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_QUOTES = {('"', '"'), ("'", "'"), ("“", "”")}


def take_answer(text: str, most_characters: int = MAX_ANSWER_CHARACTERS) -> str:
    """Return the paragraph in an answer: without thoughts, control codes, line breaks, and quotation marks
    around it.

    Text beyond `most_characters` is cut off.
    """
    text = _THOUGHTS.sub("", text).rpartition("</think>")[2]
    text = " ".join(drop_control_codes(text).split())[:most_characters]
    if len(text) > 1 and (text[0], text[-1]) in _QUOTES:
        text = text[1:-1].strip()
    return text
