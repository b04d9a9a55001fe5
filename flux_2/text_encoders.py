"""FLUX.2's text encoders: what is taken from Mistral Small 3 and Qwen3, for `encoders.language_encoder`.

Templates and layers are those of the releases; the name of the states is that of the known caches.
"""

from dataclasses import replace

from encoders.language_encoder import LanguageUse, qwen3_chat, qwen_tokenizer
from encoders.language_models import MISTRAL3, QWEN3
from encoders.text_encoder import TokenizerSource
from modules.checkpoints.tokenizers import TokenizerFiles

KEY = "ctx_vec"
OPTION = "--text_encoder_tokenizer"
TOKENS = 512  # of a text with its template; padding is seen by the transformer as the rest
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
_BEFORE, _AFTER = qwen3_chat(thinks=False)
_MISTRAL_FILES = TokenizerFiles(
    option=OPTION,
    names=("tokenizer.json",),
    folder="tokenizer",
    repository="black-forest-labs/FLUX.2-dev",
    # inside the encoder's folder; beside a single file; beside text_encoder (diffusers)
    beside=(".", "mistral_3", "tokenizer", "../tokenizer"),
    token="[INST]",
)
MISTRAL_USE = LanguageUse(
    name="m3",
    states_key=KEY,
    model=MISTRAL3,
    source=TokenizerSource(_MISTRAL_FILES, adds_own=False),
    most=TOKENS,
    before=f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST]",
    after="[/INST]",
    states=(10, 20, 30),
    pad="<pad>",
    pads_left=True,
    at_once=1,
)
QWEN3_4B_USE = LanguageUse(
    name="qwen3",
    states_key=KEY,
    model=QWEN3,
    source=qwen_tokenizer(OPTION, "black-forest-labs/FLUX.2-klein-4B"),
    most=TOKENS,
    before=_BEFORE,
    after=_AFTER,
    states=(9, 18, 27),
    pad="<|endoftext|>",
    at_once=1,  # so that a state does not depend on other prompts, to the last bit
)
QWEN3_8B_USE = replace(
    QWEN3_4B_USE,
    model=replace(QWEN3, files="qwen_3_8b.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-8B,"),
    source=qwen_tokenizer(OPTION, "black-forest-labs/FLUX.2-klein-9B"),
)
