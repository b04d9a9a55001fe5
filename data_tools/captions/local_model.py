"""Describe images and clips with a vision-language model on this machine.

The model can be any that transformers loads as `AutoModelForImageTextToText`, including GIT, which takes no
text.
Code and pickles that come with a model are never executed.
"""

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from checkpoints.model_files import find_model_folder
from checkpoints.model_folders import (
    Shape,
    build_on_meta,
    check_vision_language_settings,
    require_matching_shapes,
)
from data_tools.captions.asking import (
    AskOptions,
    CaptionInput,
    CaptionResults,
    NoCaptionError,
    ReadFrames,
    caption_in_batches,
    parse_caption,
    select_prompt,
)
from data_tools.captions.places import CaptionLocation
from modules.chat_templates import TemplateError, render_chat
from modules.control_codes import shorten
from modules.devices import select_compute_dtype, select_device
from modules.errors import (
    CheckpointError,
    InstallationError,
    MemoryPlanError,
    OptionError,
    UserError,
    catch_panics,
)
from modules.options import Options, option

# files that are downloaded from a repository; these contain no code
DOWNLOAD_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
SAFE_LOADING: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
GIT = "git"  # model_type of models that describe one image and take no text, arXiv 2205.14100


class CaptionModelOptions(Options, title="a model that runs here"):
    """Options of a captioning model that runs on this machine."""

    model: str | None = option(
        "folder of a vision-language model for transformers (config.json, safetensors), or the name of "
        "its repository on Hugging Face; code that comes with a model is never run"
    )
    batch_size: int | None = option("images or clips described together; default: 1", minimum=1, maximum=1024)
    dtype: str | None = option(
        "bfloat16, float16 or float32; default: that of the model's files, on a CPU float32"
    )
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")


@dataclass(frozen=True)
class LocalModel:
    """A loaded captioning model with its processor."""

    model: Any
    processor: Any
    ask_options: AskOptions
    batch_size: int
    takes_text: bool = True  # False: it describes a single image, and it takes no prompt

    def caption(self, locations: Sequence[CaptionLocation], read_frames: ReadFrames) -> CaptionResults:
        """Yield (location, caption or error) for each image or clip, in order.

        `read_frames` returns the frames of a location that the model sees. If a batch fails, its images and
        clips are processed one by one.

        Raises:
            MemoryPlanError: If the device's memory is too small.
        """
        return caption_in_batches(
            locations,
            read_frames,
            batch_size=self.batch_size,
            item_bytes=3 * self.ask_options.max_pixels * self.ask_options.num_frames,
            caption_batch=self._caption_batch,
        )

    def _caption_batch(
        self, batch: Sequence[CaptionInput]
    ) -> Iterator[tuple[CaptionLocation, str | Exception]]:
        """Yield (location, caption or error) for each image or clip in a batch."""
        try:
            answers = self.generate_answers(batch)
        except torch.OutOfMemoryError:
            raise MemoryPlanError(
                f"{len(batch)} at a time with up to {self.ask_options.num_frames} frames do not fit into the "
                "memory. Lower --batch_size, --num_frames or --max_pixels; captions that are already "
                "written are kept."
            ) from None
        except Exception as error:  # the processor or the model rejects an input: find out which one
            if len(batch) == 1:
                (location, _) = batch[0]
                yield location, NoCaptionError(f"the model fails: {shorten(str(error), 300)}")
                return
            for failed_input in batch:
                yield from self._caption_batch([failed_input])
            return
        for (location, _), answer in zip(batch, answers, strict=True):
            try:
                yield location, parse_caption(answer.text, answer.was_cut)
            except NoCaptionError as error:
                yield location, error

    @torch.no_grad()
    def generate_answers(self, batch: Sequence[CaptionInput]) -> list["GeneratedAnswer"]:
        """Return the model's answer for each image or clip."""
        prompts = []
        for location, frames in batch:
            prompt = select_prompt(location, self.ask_options)
            prompts.append(self.format_prompt(prompt, num_images=len(frames)))
        inputs = self._make_inputs(prompts, batch) if self.takes_text else self._make_image_inputs(batch)
        answer_tokens = self._generate_tokens(inputs, names=[location.name for location, _ in batch])
        answer_texts = self.processor.tokenizer.batch_decode(answer_tokens, skip_special_tokens=True)
        # one token, several or none ends a text
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            end_tokens = frozenset[int]()
        else:
            end_tokens = frozenset(ends if isinstance(ends, (list, tuple)) else [ends])
        answers = []
        for prompt, answer_text, tokens in zip(prompts, answer_texts, answer_tokens, strict=True):
            if prompt.rstrip().endswith("<think>"):  # the prompt ends with the opening tag of the thought
                answer_text = f"<think>{answer_text}"
            was_cut = end_tokens.isdisjoint(tokens.tolist())  # no end token: max_new_tokens was reached
            answers.append(GeneratedAnswer(answer_text, was_cut))
        return answers

    def _generate_tokens(self, inputs: Any, names: Sequence[str]) -> Tensor:
        """Generate tokens, B T, after each prompt; a temperature above 0 samples them, seeded by `names`."""
        noise = GumbelNoise(self.ask_options.temperature, self.ask_options.seed, names)
        generated = self.model.generate(
            **inputs,
            max_new_tokens=self.ask_options.max_new_tokens,
            num_beams=1,
            # tokens are sampled by `GumbelNoise`, so that a caption does not depend on others of its batch
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=[noise] if self.ask_options.temperature else None,
        )
        num_prompt_tokens = inputs["input_ids"].shape[1]  # the output repeats the prompt
        new_tokens: Tensor = generated[:, num_prompt_tokens:]
        return new_tokens

    def _make_inputs(self, prompts: Sequence[str], batch: Sequence[CaptionInput]) -> Any:
        """Return the model's input tensors for the prompts and frames of a batch, on its device."""
        images = [[Image.fromarray(frame) for frame in frames] for _, frames in batch]
        start_token = self.processor.tokenizer.bos_token
        settings: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        # the templates of some models add the start token themselves
        if start_token and prompts[0].startswith(start_token):
            settings["add_special_tokens"] = False
        inputs = self.processor(text=prompts, images=images, **settings)
        return inputs.to(self.model.device, self.model.dtype)

    def _make_image_inputs(self, batch: Sequence[CaptionInput]) -> Any:
        """Return inputs for a model without prompts: images, and the first token of each answer."""
        if any(location.prompt is not None or len(frames) > 1 for location, frames in batch):
            raise ValueError("it describes single images and accepts no text; pass another --model")
        images = [Image.fromarray(frames[0]) for _, frames in batch]
        inputs = self.processor(images=images, return_tensors="pt")
        start = self.model.generation_config.bos_token_id
        inputs["input_ids"] = torch.full((len(images), 1), start)
        return inputs.to(self.model.device, self.model.dtype)

    def format_prompt(self, prompt: str, num_images: int) -> str:
        """Return the model's input text: the system prompt and the prompt in the model's chat template.

        A processor's template accepts lists of images and texts. A tokenizer's template accepts only texts:
        then, and without a template, image tokens precede the prompt.

        Raises:
            OptionError: If the template does not take the system prompt.
        """
        if not self.takes_text:
            return ""
        system = self.ask_options.system_prompt
        processor_template = getattr(self.processor, "chat_template", None)
        image_token = getattr(self.processor, "image_token", "<image>")
        prompt_with_images = f"{image_token * num_images}\n{prompt}"
        user_content: Any
        system_content: Any
        if processor_template is not None:
            images: list[dict[str, str]] = [{"type": "image"}] * num_images
            user_content = [*images, {"type": "text", "text": prompt}]
            system_content = [{"type": "text", "text": system}]
        elif self.processor.tokenizer.chat_template is not None:
            user_content, system_content = prompt_with_images, system
        else:
            return f"{system}\n{prompt_with_images}" if system else prompt_with_images
        messages = [{"role": "user", "content": user_content}]
        if system:
            messages.insert(0, {"role": "system", "content": system_content})
        try:
            return render_chat(self.processor.tokenizer, processor_template, messages)
        except TemplateError as error:
            hint = "; does it know system messages? Try without --system_prompt" if system else ""
            raise OptionError(f"--model: its chat template fails: {error}{hint}") from None


class GeneratedAnswer(NamedTuple):
    """A model's answer, and whether the token limit cut it off."""

    text: str
    was_cut: bool


class GumbelNoise:
    """Adds noise to next-token scores, so that the largest score is a random draw.

    With Gumbel noise, the largest of `scores / temperature + noise` is a draw from the softmax of the scores
    (Maddison et al. 2014, arXiv 1411.0030). Each row has its own generator, seeded by its name, so that its
    tokens do not depend on the batch.
    """

    def __init__(self, temperature: float, seed: int, names: Sequence[str]) -> None:
        self._temperature = temperature
        texts = [f"{seed}\n{name}".encode("utf-8", "surrogateescape") for name in names]
        # 64 bits, signed as torch takes them
        seeds = [int.from_bytes(hashlib.sha256(text).digest()[:8], "little") - 2**63 for text in texts]
        self._generators = [torch.Generator().manual_seed(row_seed) for row_seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores of the next token plus noise, B V in float32; `input_ids` is unused."""
        vocabulary_size = scores.shape[1]
        rows = [
            torch.rand(vocabulary_size, generator=generator, dtype=torch.float64)
            for generator in self._generators
        ]
        uniform = torch.stack(rows)  # B V
        # the limits keep both logarithms finite
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))  # Gumbel distribution
        return scores.float() / self._temperature + noise.to(scores.device, torch.float32)


def load_model(options: CaptionModelOptions, ask_options: AskOptions) -> LocalModel:
    """Load the captioning model that --model selects, from a folder or a repository.

    Raises:
        CheckpointError: If the folder contains an unusable model.
        DownloadError: If --model names a repository that cannot be downloaded.
    """
    device = select_device(options.device)
    dtype = select_compute_dtype(options.dtype, "--dtype", None)
    assert options.model is not None
    folder = find_model_folder("--model", options.model, DOWNLOAD_PATTERNS)
    if not (folder / "config.json").is_file():
        raise _unusable(
            folder,
            "there is no config.json in this folder. Pass the folder of a model as transformers saves it.",
        )
    shapes = check_vision_language_settings(folder, "--model")
    import transformers  # only with --model

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, processor = _load_model_and_processor(folder, shapes, dtype)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise many libraries' errors
        reason = shorten(str(error), 400)
        raise _unusable(folder, f"transformers cannot load it as a vision-language model: {reason}") from None
    model.eval().requires_grad_(False)
    if dtype is None and device.type == "cpu":  # few CPUs are fast in 16 bits
        model.float()
    takes_text = model.config.model_type != GIT
    if not takes_text and (ask_options.prompt or ask_options.system_prompt):
        raise OptionError(
            f"--model {folder} accepts no text: omit --prompt and --system_prompt, or pass another model"
        )
    loaded = LocalModel(model.to(device), processor, ask_options, options.batch_size or 1, takes_text)
    loaded.format_prompt("a", 1)  # so that a chat template that always fails is reported here
    return loaded


def _load_model_and_processor(
    folder: Path, shapes: list[Shape], dtype: torch.dtype | None
) -> tuple[Any, Any]:
    """Load a vision-language model and its processor with transformers, onto the CPU."""
    # `shapes`, read from the weight files, are compared with config.json before any weights are loaded.
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, **SAFE_LOADING)
    if getattr(config, "quantization_config", None) is not None:
        raise _unusable(
            folder,
            "its weights are quantized, for which transformers may fetch code. Pass the model in 16 or 32 "
            "bits, or let a server run it: --api_base.",
        )
    empty_model = build_on_meta(transformers.AutoModelForImageTextToText.from_config, config)
    require_matching_shapes(folder, "--model", empty_model, shapes, is_exact=False)
    with catch_panics():
        processor = _load_processor(folder, config.model_type)
    processor.tokenizer.padding_side = "left"  # answers follow the prompt of each row
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    model = _load_network(folder, config, dtype)
    with catch_panics():
        processor.tokenizer("a b")  # so that a tokenizer that fails with any text is reported here
    return model, processor


def _load_processor(folder: Path, model_type: str) -> Any:
    """Load the processor that prepares a model's texts and images."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, **SAFE_LOADING)
    except ImportError as error:
        # only its video part may need the missing package
        processor = _without_videos(folder, model_type)
        if processor is None:
            raise InstallationError(
                f"--model {folder}: its processor needs a package that is missing here: "
                f"{' '.join(str(error).split())}"
            ) from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise _unusable(
            folder,
            "its processor does not accept images. Pass a vision-language model, with "
            "preprocessor_config.json or processor_config.json.",
        )
    return processor


def _unusable(folder: Path, reason: str) -> CheckpointError:
    """Return an error that says why a model folder cannot be used."""
    return CheckpointError(f"--model {folder}: {reason}", folder)


def _without_videos(folder: Path, model_type: str) -> Any:
    """Load a processor without its video processor, which needs torchvision; None if it fails."""
    # Clips are shown to the model as images.
    import transformers
    from transformers.models.auto import processing_auto

    class_names: Any = getattr(processing_auto, "PROCESSOR_MAPPING_NAMES")  # noqa: B009, it is not exported
    processor_class = getattr(transformers, class_names.get(model_type, ""), None)
    if importlib.util.find_spec("torchvision") is not None or processor_class is None:
        return None

    def check_component(self: Any, name: str, component: Any) -> Any:
        """Check a processor's component as transformers does, but accept a missing video processor."""
        if name == "video_processor" and component is None:
            return None
        return processor_class.check_argument_for_proper_class(self, name, component)

    # transformers checks components in the constructor: a subclass with another check accepts None
    images_only = type(
        processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": check_component}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **SAFE_LOADING)
    # `unused` holds the settings that the constructor does not take; either may have the chat template
    settings, unused = processor_class.get_processor_dict(folder, **SAFE_LOADING)
    try:
        return images_only(
            image_processor=transformers.AutoImageProcessor.from_pretrained(folder, **SAFE_LOADING),
            tokenizer=tokenizer,
            video_processor=None,
            chat_template={**unused, **settings}.get("chat_template") or tokenizer.chat_template,
        )
    except (ImportError, TypeError):  # the class takes no video processor, or another part is missing
        return None


def _load_network(folder: Path, config: Any, dtype: torch.dtype | None) -> Any:
    """Load a model with scaled-dot-product attention, or with eager attention if that is unsupported."""
    from transformers import AutoModelForImageTextToText

    settings = {"config": config, "dtype": dtype or "auto", "use_safetensors": True, **SAFE_LOADING}
    try:
        # named here, because config.json may name an attention whose code would be downloaded and executed
        return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa", **settings)
    except ValueError as error:
        if "attn_implementation" not in str(error) and "scaled_dot_product_attention" not in str(error):
            raise
        return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", **settings)
