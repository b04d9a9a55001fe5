"""Recognize files that are not models by their first bytes, for messages."""

import re

GGUF = b"GGUF"
LFS_POINTER = b"version https://"
# an ONNX file is a protobuf message: field 1 (format version 3 to 20), then field 2 (name of the producer)
ONNX = re.compile(rb"\x08[\x03-\x14]\x12")


def is_pointer_or_page(start: bytes) -> bool:
    """Return whether a file starts like a Git LFS pointer or a web page instead of a model."""
    return start.startswith(LFS_POINTER) or start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<"


def describe_kind(start: bytes) -> str:
    """Return the end of an error message about a file that is not a model: what it is, and what to do."""
    if start.startswith(GGUF):
        return (
            "is a GGUF file, which cannot be read here. Pass the safetensors or .pth file of the same model."
        )
    if ONNX.match(start):
        return "is an ONNX file, which only yolo_blur.py --model accepts. Pass a safetensors or .pth file."
    if start.startswith(LFS_POINTER):
        return (
            "is a Git LFS pointer, a short text file instead of the model. Run git lfs pull in its "
            "folder, or download the file itself."
        )
    if is_pointer_or_page(start):
        return (
            "is a web page, not a model: the site may have asked for a login. Log in and download the file "
            "again."
        )
    return (
        "is neither a safetensors nor a PyTorch file, or its beginning is damaged. Download or copy it again."
    )
