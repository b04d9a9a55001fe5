"""Z-Image's text encoder: what is taken from Qwen3, as data for `encoders.language_encoder`.

Length and state are those of the release; the name of the states is that of the known caches.
"""

from encoders.language_encoder import LanguageUse, qwen3_chat, qwen_tokenizer
from encoders.language_models import QWEN3

KEY = "llm_embed"
_BEFORE, _AFTER = qwen3_chat(thinks=True)
Z_IMAGE_USE = LanguageUse(
    name="llm",
    states_key=KEY,
    model=QWEN3,
    source=qwen_tokenizer("--text_encoder_tokenizer", "Tongyi-MAI/Z-Image-Turbo"),
    most=512,  # with those of the template
    before=_BEFORE,
    after=_AFTER,
    states=(-2,),
    at_once=1,  # so that a state does not depend on other prompts, to the last bit
)
