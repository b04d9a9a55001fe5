"""Words that ComfyUI's prompts mark as the names of embeddings: `embedding:NAME`. Standard library only."""

import logging
import re

from contract.brought_words import takes_words
from contract.family import Family
from contract.requests import Request
from modules.control_codes import shorten
from modules.limits import MAX_LINE_SHOWN

logger = logging.getLogger(__name__)

# the name may have the ending of its file
_MARKED = re.compile(r"(?<!\w)embedding:\s*([^\s,()\[\]:]+)", re.IGNORECASE)


def find_embeddings(text: str) -> list[str]:
    """Return the names that a prompt marks as embeddings."""
    return _MARKED.findall(text)


def warn_of_embeddings(family: Family, request: Request) -> None:
    """Warn about names that a request marks as embeddings if its model does not support them.

    A model that supports them reports by itself which are not loaded.
    """
    if takes_words(family):
        return
    text = " ".join(filter(None, (request.prompt, request.negative_prompt)))
    for name in dict.fromkeys(find_embeddings(text)):
        logger.warning(
            "embedding:%s in a prompt is read as words: this model takes no embeddings",
            shorten(name, MAX_LINE_SHOWN),
        )
