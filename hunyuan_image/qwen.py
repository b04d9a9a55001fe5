"""The language model of Qwen2.5-VL, whose states are HunyuanImage-2.1's text: its files and its template.

For a text alone the model's rotary positions are plain ones: those of images equal them. Source: Bai et al.
2025, arXiv 2502.13923; the template is that of the released HunyuanImage-2.1.
"""

from hunyuan_model.text_checkpoints import LanguageModel
from modules.checkpoints.tokenizers import TokenizerFiles

SKIP_LAYERS = 2  # after the state that is used, which is not normed
DROPPED = 34  # tokens of the template before the prompt, whose states are cut off
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>"

QWEN = LanguageModel(
    what="the language model of Qwen2.5-VL",
    option="--text_encoder",
    files="qwen_2.5_vl_7b.safetensors of Comfy-Org, or the folder of Qwen/Qwen2.5-VL-7B-Instruct,",
    kind="qwen2",
    beside=(
        *("lm_head.", "visual.", "tokenizer"),  # tokenizer: its bytes in ComfyUI's files
        *("model.lm_head.", "model.visual.", "language_model.lm_head."),
    ),
    defaults={
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
    },
    theta=1e6,
    eps=1e-6,
    has_bias=True,
    rope_types=("default", "mrope"),
)
TOKENIZER = TokenizerFiles(
    option="--text_encoder_tokenizer",
    names=("tokenizer.json",),
    folder="",
    repository="Qwen/Qwen2.5-VL-7B-Instruct",
    # inside the encoder's folder; beside a single file; beside text_encoder (diffusers)
    beside=(".", "qwen_2.5_vl", "tokenizer", "../tokenizer"),
    token="<|im_start|>",
)
