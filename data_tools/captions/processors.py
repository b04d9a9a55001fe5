"""Load a model's processor, which makes inputs from texts and images."""

import importlib.util
from pathlib import Path
from typing import Any

from modules.errors import CheckpointError, InstallationError
from modules.text_files import parse_json, read_text

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# files that may name the class of a processor
_NAMING = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(folder: Path) -> Any:
    """Return the processor of a model.

    Processors of images come with Pillow alone. Those of videos need torchvision; without it the processor of
    a model for both is made without them, as clips are shown as images. Raises CheckpointError if there is no
    processor that takes images, InstallationError if it needs a package that is missing.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, **LOCAL)
    except ImportError as error:
        processor = _without_videos(folder)
        if processor is None:
            raise InstallationError(
                f"--model {folder}: its processor needs a package that is missing here: "
                f"{' '.join(str(error).split())}"
            ) from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(
            f"--model {folder}: its processor takes no images. Give a vision-language model, with "
            "preprocessor_config.json or processor_config.json.",
            folder,
        )
    return processor


def image_token(processor: Any) -> str:
    """Return the token for an image in a text without a chat template."""
    return str(getattr(processor, "image_token", "<image>"))


def _without_videos(folder: Path) -> Any:
    """Return the processor without its part for videos; None if another part is missing."""
    import transformers

    if importlib.util.find_spec("torchvision") is not None:
        return None
    kind = getattr(transformers, _processor_class(folder) or "", None)
    if kind is None or not issubclass(kind, transformers.ProcessorMixin):
        return None

    def check(self: Any, name: str, part: Any) -> Any:
        is_left_out = name == "video_processor" and part is None
        return None if is_left_out else kind.check_argument_for_proper_class(self, name, part)

    images_only = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    template = folder / "chat_template.jinja"
    try:
        return images_only(
            image_processor=transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL),
            tokenizer=tokenizer,
            video_processor=None,
            chat_template=read_text(template) if template.is_file() else _old_template(folder, tokenizer),
        )
    except (ImportError, TypeError):  # it has no such part, or others are missing too
        return None


def _old_template(folder: Path, tokenizer: Any) -> str | None:
    """Return the template where earlier releases have it: in a file of its own, or with the tokenizer."""
    found = _read_json(folder / "chat_template.json").get("chat_template")
    return found if isinstance(found, str) else tokenizer.chat_template


def _processor_class(folder: Path) -> str | None:
    names = (_read_json(folder / name).get("processor_class") for name in _NAMING)
    return next((name for name in names if isinstance(name, str)), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
