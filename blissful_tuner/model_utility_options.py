"""Options of model_utility.py. Standard library only."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from modules.command import did_you_mean
from modules.errors import OptionError

# what --dtype takes; 8 bits are made while a model is loaded, where it is known which layers bear it
DTYPES = ("fp32", "float32", "float", "fp16", "float16", "bf16", "bfloat16")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
LEAST_SHARD = 1000  # bytes
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)
_NO_CODE = "files that hold program code are never opened here, as opening them would run that code"


@dataclass(frozen=True)
class ModelUtilityOptions:
    """Which file is looked at, and what is written of it."""

    input: Path
    convert: Path | None
    inspect: bool
    hash: bool
    json: bool
    target_keys: tuple[str, ...] | None
    exclude_keys: tuple[str, ...] | None
    full_target_keys: tuple[str, ...] | None
    full_exclude_keys: tuple[str, ...] | None
    strip_prefix: tuple[str, ...] | None
    add_prefix: str | None
    dtype: str | None
    shard_size: str | None
    weights_only: str
    disable_weights_only: bool
    yes: bool

    def __post_init__(self) -> None:
        self._check_weights_only()
        if self.dtype is not None and self.dtype not in DTYPES:
            if "8" in self.dtype:
                raise OptionError(
                    f"--dtype {self.dtype}: weights in 8 bits are not written. Load the file with "
                    "--fp8_scaled, or use fp16 or bf16"
                )
            raise OptionError(
                f"--dtype {self.dtype} is no dtype. Use fp32, fp16 or bf16.{did_you_mean(self.dtype, DTYPES)}"
            )
        if self.convert is None:
            for option in ("full_target_keys", "full_exclude_keys", "strip_prefix", "add_prefix", "dtype"):
                self._refuse_alone(option)
            self._refuse_alone("shard_size")
        if not self.inspect and self.dtype is None and (self.target_keys or self.exclude_keys):
            raise OptionError(
                "--target_keys and --exclude_keys say which tensors --dtype casts and --inspect lists: give "
                "one of these; --full_target_keys and --full_exclude_keys leave tensors out"
            )
        for option in ("target_keys", "exclude_keys", "full_target_keys", "full_exclude_keys"):
            if "" in (getattr(self, option) or ()):
                raise OptionError(f"--{option}: an empty text is in every name. Leave it out")
        if self.shard_size is not None and self.shard_bytes < LEAST_SHARD:
            raise OptionError(f"--shard_size {self.shard_size}: give a size such as 5GB or 500MB")

    @property
    def shard_bytes(self) -> int:
        """Return the largest size of a file, in bytes; 0 if there is none or it cannot be read."""
        found = _SIZE.fullmatch((self.shard_size or "").strip())
        if found is None:
            return 0
        unit = UNITS[found["unit"].lower()]
        if found["binary"]:
            unit = {1: 0, 10**3: 1 << 10, 10**6: 1 << 20, 10**9: 1 << 30, 10**12: 1 << 40}[unit]
        return int(float(found["number"]) * unit)

    def _refuse_alone(self, option: str) -> None:
        if getattr(self, option):
            raise OptionError(f"--{option} says how to write a file: give its name with --convert")

    def _check_weights_only(self) -> None:
        given = self.weights_only.strip().lower()
        if self.disable_weights_only or given in {"false", "no", "0"}:
            option = "--disable_weights_only" if self.disable_weights_only else "--weights_only false"
            raise OptionError(f"{option}: {_NO_CODE}. Ask for a safetensors version of the file")
        if given not in {"true", "yes", "1"}:
            raise OptionError(f"--weights_only {self.weights_only}: only true can be used: {_NO_CODE}")


def add_model_utility_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ModelUtilityOptions`."""
    parser.add_argument(
        "--input",
        type=str,
        required=True,
        metavar="FILE",
        help="a model (.safetensors, .sft, .pt, .pth, .bin, .ckpt), one of its shards, an index.json, or a "
        "folder with all files of a model",
    )
    _add_showing(parser)
    _add_writing(parser)
    _add_names(parser)
    _add_safety(parser)


def _add_showing(parser: argparse.ArgumentParser) -> None:
    show = parser.add_argument_group(
        "what is shown; without any of these what the file is, its dtypes and sizes"
    )
    show.add_argument("--inspect", action="store_true", help="list the tensors too: name: shape (dtype)")
    show.add_argument(
        "--hash",
        action="store_true",
        help="show SHA-256 of each file, and the checksums that model browsers look LoRAs up by",
    )
    show.add_argument("--json", action="store_true", help="print JSON; values as they are stored")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    write = parser.add_argument_group("what is written")
    write.add_argument(
        "--convert",
        "--output_path",
        dest="convert",
        type=str,
        default=None,
        metavar="FILE",
        help="write the model to this safetensors file (.pt, .pth, .bin in its name become .safetensors)",
    )
    write.add_argument("-y", "--yes", action="store_true", help="replace a file that exists without asking")
    write.add_argument(
        "--dtype", type=str, default=None, help="cast to fp32, fp16 or bf16; whole numbers stay"
    )
    write.add_argument(
        "--shard_size",
        type=str,
        default=None,
        metavar="SIZE",
        help="cut the model into files of at most this size, such as 5GB, with an index as on Hugging Face",
    )


def _add_names(parser: argparse.ArgumentParser) -> None:
    names = parser.add_argument_group("names of tensors")
    for options, what in (
        (("--target_keys", "--dtype_target_keys"), "cast and list only tensors with"),
        (("--exclude_keys", "--dtype_exclude_keys"), "do not cast or list tensors with"),
        (("--full_target_keys",), "write only tensors with"),
        (("--full_exclude_keys",), "do not write tensors with"),
    ):
        help_text = f"{what} one of these texts in their names"
        names.add_argument(*options, type=str, nargs="*", default=None, metavar="TEXT", help=help_text)
    names.add_argument(
        "--strip_prefix",
        type=str,
        nargs="*",
        default=None,
        metavar="TEXT",
        help="cut these off the beginnings of names, one after the other: model.diffusion_model.",
    )
    names.add_argument(
        "--add_prefix", type=str, default=None, metavar="TEXT", help="put this before all names"
    )


def _add_safety(parser: argparse.ArgumentParser) -> None:
    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--weights_only",
        type=str,
        default="true",
        help="only true: .pt files are read without running code in them",
    )
    safety.add_argument(
        "--disable_weights_only",
        action="store_true",
        help="refused: code in a file is never run",
    )
