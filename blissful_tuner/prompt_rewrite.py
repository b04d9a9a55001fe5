"""Rewrite prompts with a chat model into detailed descriptions like those in the training of video models.

The two modes are those of the prompt rewrite model of HunyuanVideo (Kong et al. 2024, arXiv 2412.03603,
section 4.4); the instruction is our own. Any chat model that `transformers` loads from a folder will do.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modules.chat_templates import TemplateError, render_chat
from modules.control_codes import extract_caption, shorten
from modules.errors import CheckpointError, catch_panics
from protocols.requests import Prepared, Prompts
from runtime.offload.host_memory import LoadedNetwork

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 400  # a longer answer would be cut by the text encoders anyway
ATTENTION = "eager"  # supported by all models; fast enough for a paragraph
COMMON = (
    "You write prompts for a model that makes short videos from text. Rewrite the request at the end of "
    "this message as one paragraph of plain English that describes what is seen. Answer with that paragraph "
    "alone: no heading, no quotation marks, no explanation, no remark to the reader. Translate what is not "
    "English, but leave names, and words that are to be readable in the picture, as they are. If the request "
    "is only a word or two, answer with one or two simple sentences."
)
INSTRUCTIONS: Mapping[str, str] = {
    "normal": COMMON
    + " Keep every detail: each thing and being, their number, color, place and order, what they do, the "
    "style, and all technical words about camera, lens and light. Where style, light or mood are not said, "
    "you may add what suits the scene, in a few words. Change nothing else.",
    "master": COMMON
    + " Aim at a beautiful shot. Describe the main subject first and what it does from beginning to end, "
    "then the surroundings, then the style. Say how the picture is composed, where the light comes from and "
    "what it does to surfaces and colors, how near the camera is and how it moves. Small details of the "
    "request may give way to a clearer picture; its subject and its action may not.",
}


class PromptRewriter:
    """Rewrite prompts with a chat model; greedy decoding makes the result deterministic."""

    def __init__(self, folder: Path, mode: str) -> None:
        """Set up the rewriter; `load` reads the files.

        Args:
            folder: Folder of the chat model.
            mode: Style of the description: normal or master.
        """
        self.folder = folder
        self.mode = mode
        self._loaded = LoadedNetwork[Any, Any]()
        self._rewritten_prompts: dict[str, str] = {}

    def load(self, device: torch.device) -> None:
        """Load the model and tokenizer, or move a loaded model to the device.

        Raises:
            CheckpointError: If the folder has no chat model, or a tokenizer without a chat template.
        """
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[Any, Any]:
        """Load the chat model and its tokenizer from the folder, without running code from elsewhere."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        safe_loading: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with catch_panics():
                tokenizer = AutoTokenizer.from_pretrained(self.folder, **safe_loading)
            if tokenizer.chat_template is None:
                raise self._unusable(
                    "its tokenizer has no chat template, so it is not a chat model. Pass one that follows "
                    "instructions."
                )
            _render(tokenizer, "a cat")  # finds a broken template before the weights are loaded
            config = AutoConfig.from_pretrained(self.folder, **safe_loading)
            # set here, because config.json may name an attention whose code is fetched from the hub and run
            config._attn_implementation = ATTENTION
            if getattr(config, "quantization_config", None) is not None:
                raise self._unusable(
                    "its weights are quantized, for which transformers may fetch code. Pass the model in "
                    "16 or 32 bits."
                )
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, config=config, dtype="auto", use_safetensors=True, **safe_loading
            )
        except (CheckpointError, torch.OutOfMemoryError):
            raise
        except TemplateError as error:
            raise self._unusable(f"its chat template fails: {error}. Pass another model") from None
        except Exception as error:  # damaged files raise errors of many libraries
            raise self._unusable(f"transformers cannot load it: {shorten(str(error), 300)}") from None
        model.eval().requires_grad_(False)
        if device.type == "cpu":  # most CPUs are slow in 16 bits
            model.float()
        return model.to(device), tokenizer

    def _unusable(self, why: str) -> CheckpointError:
        """Return the exception for an unusable model folder; `why` is the reason."""
        return CheckpointError(f"--prompt_rewrite_model {self.folder}: {why}", self.folder)

    def free(self) -> None:
        """Unload the chat model."""
        self._loaded.free()

    def rewrite(self, prompt: str) -> str:
        """Return the prompt as the chat model rewrites it, or unchanged if the model's answer is empty.

        Answers are cached by prompt.
        """
        if not prompt.strip():
            return prompt
        if prompt not in self._rewritten_prompts:
            answer = extract_caption(self._ask(f"{INSTRUCTIONS[self.mode]}\n\nRequest: {prompt}"))
            if not answer:
                logger.warning(
                    "the chat model gave no answer within %d tokens, so this prompt is used unchanged: %s",
                    MAX_NEW_TOKENS,
                    prompt,
                )
            self._rewritten_prompts[prompt] = answer or prompt
            logger.info("Prompt %r is rewritten: %s", shorten(prompt, 100), self._rewritten_prompts[prompt])
        return self._rewritten_prompts[prompt]

    @torch.no_grad()
    def _ask(self, message: str) -> str:
        """Return the chat model's reply to a message, including its <think> part."""
        model, tokenizer = self._loaded.get()
        inputs = _render(tokenizer, message).to(model.device)
        generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        prompt_tokens = inputs["input_ids"][0]
        answer: str = tokenizer.decode(generated[0, len(prompt_tokens) :], skip_special_tokens=True)
        # templates of some models begin the thought themselves
        begins = tokenizer.decode(prompt_tokens[-8:]).rstrip().endswith("<think>")
        return f"<think>{answer}" if begins else answer


def _render(tokenizer: Any, message: str) -> Any:
    """Return the tokens of a chat with one user message, as input for `generate`."""
    turns = [{"role": "user", "content": message}]
    # enable_thinking=False turns off thinking in templates that support it
    text = render_chat(tokenizer, None, turns, enable_thinking=False)
    with catch_panics():
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")


def rewrite_prompts(prepared: Prepared, rewriter: PromptRewriter) -> Prepared:
    """Return the request with the prompt of each section rewritten; outputs record the new prompts.

    Negative prompts do not change. Prompt weights are dropped, because the weighted words may be gone.
    """
    sections: dict[int, Prompts] = {}
    for section, section_prompts in prepared.prompts.items():
        prompt = section_prompts.positive
        if prompt.weighted_spans:
            logger.warning("the weights in the prompt are left out because it is rewritten: %s", prompt.text)
        new_prompt = replace(prompt, text=rewriter.rewrite(prompt.text), weighted_spans=())
        sections[section] = replace(section_prompts, positive=new_prompt)
    # sections often share a prompt: list each rewritten prompt once
    rewritten = list(dict.fromkeys(section_prompts.positive.text for section_prompts in sections.values()))
    metadata = {**prepared.extra_metadata, "rewritten_prompt": "\n".join(rewritten)}
    return replace(prepared, prompts=sections, extra_metadata=metadata)
