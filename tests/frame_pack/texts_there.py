"""What the released FramePack makes of a text, with PyPI's transformers and the files that are given to our
scripts.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.golden_cases import read_case
from tests.parity.hunyuan import load_clip

KEPT_TOKENS = 256


def template_there(system: str | None = None) -> tuple[str, str]:
    """What stands before a prompt and behind it. system: in place of the recorded system text."""
    text = read_case("text_constants")[0]["hunyuanvideo_llm_templates"]["dit-llm-encode-video"]["template"]
    before, behind = text.split("{}")
    if system is not None:
        start, end = before.index("\n\n") + 2, before.index("<|eot_id|>")
        before = before[:start] + system + before[end:]
    return before, behind


class TextsThere:
    """Both encoders of a release's folder, on the CPU."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "text_encoder")
        self.llama: nn.Module = LlamaForCausalLM.from_pretrained(
            folder / "text_encoder", dtype=dtype
        ).model.eval()
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "text_encoder_2")
        self.clip = load_clip(folder / "text_encoder_2").to(dtype)

    @torch.no_grad()
    def llama_vec(self, prompt: str, system: str | None = None) -> Tensor:
        """n C: the third-last hidden states of the prompt's own tokens and what ends it, at most 256."""
        before, behind = template_there(system)
        start = len(self.tokenizer(before).input_ids)
        filled = {"padding": "max_length", "max_length": KEPT_TOKENS + start, "truncation": True}
        tokens = self.tokenizer([before + prompt + behind], **filled, return_tensors="pt")
        states = self.llama(**_inputs(tokens), output_hidden_states=True).hidden_states[-3]
        return states[0, start : int(tokens.attention_mask.sum())]

    @torch.no_grad()
    def clip_l_pooler(self, prompt: str) -> Tensor:
        """C: the state of the first end token."""
        filled = {"padding": "max_length", "max_length": 77, "truncation": True}
        return self.clip(
            self.clip_tokenizer([prompt], **filled, return_tensors="pt").input_ids
        ).pooler_output[0]


def _inputs(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}
