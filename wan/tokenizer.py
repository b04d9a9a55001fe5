"""Where the tokenizer of Wan's umT5 is."""

from encoders.t5_tokenizer import T5Tokenizers
from modules.checkpoints.tokenizers import TokenizerFiles

MAX_TOKENS = 512  # with the end token, as trained
TOKENIZER = T5Tokenizers(
    TokenizerFiles(
        option="--t5_tokenizer",
        names=("tokenizer.json", "spiece.model", "tokenizer.model"),
        folder="google/umt5-xxl",  # in the released repositories of Wan2.1
        repository="Wan-AI/Wan2.1-T2V-14B",
        # official repositories; diffusers pipelines, with text_encoder and tokenizer side by side; a
        # tokenizer saved in the text encoder's folder
        beside=("google/umt5-xxl", "tokenizer", "../tokenizer", "."),
    ),
    MAX_TOKENS,
)
