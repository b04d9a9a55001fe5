"""Check that a file that arrived is of the kind that its name promises, whatever a site sent."""

from pathlib import Path

from modules.checkpoints.containers import ONNX, PICKLE, ZIP, open_file
from modules.checkpoints.tokenizers import check_sentencepiece
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_content, read_text

MOST_BYTES = 1 << 28  # of a tokenizer; the largest has 33 MB
_PIECES = b"\x0a"  # a SentencePiece model begins with its first piece


def find_other_kind(path: Path, name: str) -> str | None:
    """Return why a file is not of the kind that the end of `name` promises, or None if it is.

    Headers are read, and files of torch without running code. Other kinds of names are not judged.
    """
    kind = name.rpartition(".")[2]
    try:
        if kind in ("safetensors", "pt", "pth"):
            opened = open_file(path)
            opened.close()
            if kind == "safetensors" and not opened.tensors:
                return "it holds no tensors"
        with path.open("rb") as file:
            start = file.read(16)
        match kind:
            case "safetensors" if start[8:9] != b"{":
                return "it is a file of torch, not of safetensors"
            case "pt" | "pth" if start[:4] != ZIP and start[:1] != PICKLE:
                return "it is not a file of torch"
            case "onnx" if not ONNX.match(start):
                return "it is not an ONNX file"
            case "json" if not isinstance(parse_json(read_text(path, MOST_BYTES)), dict):
                return "it is not a JSON table"
            case "model":
                if not start.startswith(_PIECES):
                    return "it is not a SentencePiece model"
                check_sentencepiece(read_content(path, MOST_BYTES))
    except (CheckpointError, OSError, ValueError) as error:
        # the message names the file that nobody is to use; what it is comes first
        return str(error).removeprefix(f"{path} ").partition(". ")[0].rstrip(".").splitlines()[0]
    return None
