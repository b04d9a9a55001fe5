"""Qwen-Image's text encoder: what is taken from Qwen2.5-VL, as data for `encoders.language_encoder`.

Template and lengths are those of the release; the name of the states is that of the known caches.
"""

from encoders.language_encoder import LanguageUse, read_qwen_tokenizer
from encoders.language_models import QWEN25_VL
from encoders.text_encoder import TokenizerSource
from modules.checkpoints.tokenizers import TokenizerFiles

KEY = "vl_embed"
TOKENIZER = TokenizerFiles(
    option="--text_encoder_tokenizer",
    names=("tokenizer.json", "vocab.json"),
    folder="",
    repository="Qwen/Qwen2.5-VL-7B-Instruct",
    # inside the encoder's folder; beside a single file; beside text_encoder (diffusers)
    beside=(".", "qwen_2.5_vl", "tokenizer", "../tokenizer"),
    token="<|im_start|>",
)
QWEN_USE = LanguageUse(
    name="vl",
    states_key=KEY,
    model=QWEN25_VL,
    source=TokenizerSource(TOKENIZER, adds_own=False, read_file=read_qwen_tokenizer),
    most=1024,  # with those of the template behind the prompt
    before="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n",
    dropped=34,
    at_once=1,  # so that a state does not depend on other prompts, to the last bit
)
