"""Describe whether there is a token for the Hugging Face Hub, without reading it."""

import os
from pathlib import Path

from modules.pages.language import say

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # as huggingface_hub reads them
TOKENS = "https://huggingface.co/settings/tokens"


def describe_login() -> str:
    """Return a sentence that says whether a token for the Hugging Face Hub was found."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return say("HF_HUB_OFFLINE is set: nothing is downloaded. Start the server without it.")
    for name in VARIABLES:
        if os.environ.get(name, "").strip():
            return say("A token was found in the variable %(name)s.", name=name)
    from huggingface_hub import constants  # takes a while to load

    path = Path(constants.HF_TOKEN_PATH)
    try:
        is_there = path.is_file() and path.stat().st_size > 0
    except OSError:
        is_there = False
    if is_there:
        return say("A token was found in the file %(path)s.", path=path)
    return say(
        "No token. Models whose license is accepted on their page need one: make it at "
        "%(tokens)s and type hf auth login in a terminal.",
        tokens=TOKENS,
    )
