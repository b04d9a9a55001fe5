"""Have a vision-language model that runs here describe images and clips.

Any model that transformers loads as `AutoModelForImageTextToText` will do. Nothing that comes with a model is
run: no code of its own, no pickle.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_tools.captions.answers import Answer, Answers, Frames, Look, NoCaptionError, caption_in, prompt_for
from data_tools.captions.drawing import draw_words
from data_tools.captions.options import AskOptions, CaptionModelOptions
from data_tools.captions.planning import CaptionJob
from data_tools.captions.processors import image_token, load_processor
from dataset.caching.prefetch import run_ahead
from modules.checkpoints.model_files import find_model_folder
from modules.control_codes import shorten
from modules.devices import choose_compute_dtype, choose_device
from modules.errors import (
    CheckpointError,
    InstallationError,
    MemoryPlanError,
    OptionError,
    UserError,
)

logger = logging.getLogger(__name__)

AHEAD_BYTES = 1 << 30  # of frames that wait for the model
WORKERS = 4
# of a repository, what is fetched: no code
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class LocalModel:
    """A loaded model with its processor."""

    model: Any
    processor: Any
    ask: AskOptions
    batch_size: int

    def answer(self, jobs: Sequence[CaptionJob], look: Look) -> Answers:
        """Yield a caption, or why there is none, for each job, in order.

        Threads read files ahead. If a batch fails, its images and clips are asked about one by one. Raises
        MemoryPlanError if the device's memory is too small.
        """
        frame_bytes = 3 * self.ask.max_pixels * self.ask.num_frames
        workers = min(WORKERS, os.cpu_count() or 1)
        batch: list[tuple[CaptionJob, Frames]] = []
        for job, frames in run_ahead(jobs, look, workers, lambda _: frame_bytes, AHEAD_BYTES):
            if isinstance(frames, Exception):
                yield job, frames
                continue
            batch.append((job, frames))
            if len(batch) == self.batch_size:
                yield from self._answer_batch(batch)
                batch = []
        yield from self._answer_batch(batch)

    def _answer_batch(self, batch: Sequence[tuple[CaptionJob, Frames]]) -> Iterator[Answer]:
        if not batch:
            return
        try:
            answers = self.describe(batch)
        except torch.OutOfMemoryError:
            raise MemoryPlanError(
                f"{len(batch)} at a time with up to {self.ask.num_frames} frames do not fit into the memory. "
                "Lower --batch_size, --num_frames or --max_pixels; what is written already stays."
            ) from None
        except Exception as error:  # of the processor or the model, about inputs they do not take
            if len(batch) == 1:
                yield batch[0][0], NoCaptionError(f"the model fails: {shorten(str(error), 300)}")
                return
            for one in batch:
                yield from self._answer_batch([one])
            return
        for (job, _), (text, was_cut) in zip(batch, answers, strict=True):
            try:
                yield job, caption_in(text, was_cut)
            except NoCaptionError as error:
                yield job, error

    @torch.no_grad()
    def describe(self, batch: Sequence[tuple[CaptionJob, Frames]]) -> list[tuple[str, bool]]:
        """Return for each image or clip the model's answer, and whether it was cut."""
        texts = [self.message(prompt_for(job, self.ask), len(frames)) for job, frames in batch]
        images = [[Image.fromarray(frame) for frame in frames] for _, frames in batch]
        inputs = self.inputs(texts, images).to(self.model.device, self.model.dtype)
        names = [job.place.name for job, _ in batch]
        made = self.model.generate(
            **inputs,
            max_new_tokens=self.ask.max_new_tokens,
            num_beams=1,
            # words are drawn by `draw_words`, by which a caption depends on no other of its batch
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=draw_words(self.ask, names),
        )
        answers = made[:, inputs["input_ids"].shape[1] :]
        thinks = [text.rstrip().endswith("<think>") for text in texts]  # templates may begin the thought
        decoded = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        ends = end_tokens(self.model)
        return [
            (f"<think>{text}" if thinking else text, ends.isdisjoint(tokens.tolist()))
            for text, thinking, tokens in zip(decoded, thinks, answers, strict=True)
        ]

    def inputs(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
        """Return the tensors of texts and of each one's images."""
        start = self.processor.tokenizer.bos_token
        # templates of some models put it there themselves
        has_start = bool(start) and texts[0].startswith(start)
        own: dict[str, Any] = {"add_special_tokens": False} if has_start else {}
        return self.processor(text=list(texts), images=list(images), padding=True, return_tensors="pt", **own)

    def message(self, prompt: str, num_images: int) -> str:
        """Return the text that the model reads: by its chat template, or image marks and the prompt.

        Raises OptionError if the template does not take the system prompt.
        """
        system = self.ask.system_prompt
        content = [*[{"type": "image"}] * num_images, {"type": "text", "text": prompt}]
        plain = image_token(self.processor) * num_images + "\n" + prompt
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if getattr(self.processor, "chat_template", None) is not None:
            if system:
                turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
            render = self.processor.apply_chat_template
        elif self.processor.tokenizer.chat_template is not None:  # of a model for texts: contents are texts
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": plain})
            render = self.processor.tokenizer.apply_chat_template
        else:
            return f"{system}\n{plain}" if system else plain
        try:
            text: str = render(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # of jinja2, or what the template itself raises
            why = "; does it know system messages? Try without --system_prompt" if system else ""
            raise OptionError(f"--model: its chat template fails: {shorten(str(error), 200)}{why}") from None
        return text


def end_tokens(model: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def load_model(options: CaptionModelOptions, ask: AskOptions) -> LocalModel:
    """Load the model that --model names.

    Raises InstallationError if transformers is missing, CheckpointError if the folder holds another model,
    DownloadError as `find_model_folder`.
    """
    if importlib.util.find_spec("transformers") is None:  # importing it takes seconds
        raise InstallationError(
            "--model needs the package transformers. Install it: pip install transformers, or use a server: "
            "--api_base"
        )
    device = choose_device(options.device)
    dtype = choose_compute_dtype(options.dtype, "--dtype", None)
    assert options.model is not None
    folder = _find_folder(options.model)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        processor = load_processor(folder)
        processor.tokenizer.padding_side = "left"  # answers follow the prompt of each row
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        model = _read_model(folder, dtype)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise errors of many libraries
        raise CheckpointError(
            f"--model {folder}: transformers cannot load it as a vision-language model: "
            f"{shorten(str(error), 400)}",
            folder,
        ) from None
    model.eval().requires_grad_(False)
    if dtype is None and device.type == "cpu":  # few CPUs are fast in 16 bits
        model.float()
    loaded = LocalModel(model.to(device), processor, ask, options.batch_size or 1)
    loaded.message("a", 1)  # a template that fails does so now
    return loaded


def _read_model(folder: Path, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **local)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"--model {folder}: its weights are quantised, for which transformers may fetch code. Give the "
            "model in 16 or 32 bits, or let a server run it: --api_base.",
            folder,
        )
    settings = {
        "config": config,
        "dtype": "auto" if dtype is None else dtype,
        "use_safetensors": True,
        **local,
    }
    try:
        # named, as config.json may name an attention whose code is fetched from the hub and run
        return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa", **settings)
    except ValueError as error:
        if "attn_implementation" not in str(error) and "scaled_dot_product_attention" not in str(error):
            raise
        return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", **settings)


def _find_folder(name: str) -> Path:
    """Return the folder of a model; one of a hub is fetched first, without code."""
    folder = find_model_folder("--model", name, FETCHED)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"--model {folder}: there is no config.json in this folder. Give the folder of a model as "
            "transformers saves it.",
            folder,
        )
    return folder
