"""Text encoders for tests of texts alone: tiny weights, and a tokenizer that knows a few words."""

import torch

from encoders.clip_layers import ClipText
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind, TextTower
from stable_diffusion.options import TextOptions, read_gen_img
from tests.tiny.stable_diffusion import KINDS, TEXT_DIM, text_config, text_state, vocabulary

WORDS = ("a", "cat", "dog", "red", "old", "house", "of", "the", "two", "one", ",", ".", "and", "in")
_BY_NAME: dict[str, ModelKind] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def tokenize(text: str) -> list[int]:
    """Known words have one token, other ones a token for each letter."""
    ids: list[int] = []
    for word in text.lower().split():
        ids += [10 + WORDS.index(word)] if word in WORDS else [30 + ord(letter) % 50 for letter in word]
    return ids


def make_towers(name: str) -> tuple[tuple[TextTower, ...], ModelKind]:
    """The text encoders of a tiny model, loaded anew, and its kind."""
    kind, end = _BY_NAME[name], vocabulary() - 1
    towers = []
    for number, (activation, layers) in enumerate(KINDS[name].texts):
        network = ClipText(text_config(activation, layers))
        state = text_state(name, number)
        network.load_state_dict({key.removeprefix("text_model."): value for key, value in state.items()})
        pad = end if activation == "quick_gelu" else 0
        projection = torch.eye(TEXT_DIM).flip(0) if name == "sdxl" and number == 1 else None
        towers.append(
            TextTower(
                network=network.eval().requires_grad_(False),
                tokenize=tokenize,
                start=end - 1,
                end=end,
                pad=pad,
                lora_prefix=kind.lora_prefixes[number],
                projection=projection,
                missing_layers=1 if name == "sd2" else 0,
            )
        )
    return tuple(towers), kind


def text_options(*argv: object) -> TextOptions:
    """Options as a command line gives them."""
    return read_gen_img(None, ["--ckpt", "x", "--prompt", "x", *map(str, argv)]).text
