"""Options of model_utility.py. Standard library only."""

from pathlib import Path

from checkpoints.shard_options import read_shard_size
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.options import Options, option

# what --dtype takes; 8 bits are made while a model is loaded, where it is known which layers bear it
DTYPES = ("fp32", "float32", "float", "fp16", "float16", "bf16", "bfloat16")
_NO_CODE = "files that hold program code are never opened here, as opening them would run that code"
_SHOWN = "what is shown; without any of these options: the kind of file, its dtypes and sizes"
_WRITTEN, _NAMES, _SAFETY = "what is written", "names of tensors", "safety"
_TEXTS = "one of these texts in their names"
_TO_SAY_WHICH = "--full_target_keys and --full_exclude_keys leave tensors out"


class ModelUtilityOptions(Options):
    """The file to look at, and the result to write."""

    input: Path = option(
        "a model (.safetensors, .sft, .pt, .pth, .bin, .ckpt), one of its shards, an index.json, or a folder "
        "with all files of a model",
        required=True,
        by_place=True,
        metavar="FILE",
    )
    inspect: bool = option("list the tensors too: name: shape (dtype)", title=_SHOWN)
    hash: bool = option(
        "show SHA-256 of each file, and the checksums that model browsers look LoRAs up by", title=_SHOWN
    )
    json: bool = option("print JSON; values as they are stored", title=_SHOWN)
    convert: Path | None = option(
        "write the model to this safetensors file (.pt, .pth, .bin in its name become .safetensors)",
        title=_WRITTEN,
        flags=("--convert", "--output_path"),
        metavar="FILE",
    )
    yes: bool = option("replace a file that exists without asking", title=_WRITTEN, flags=("-y",))
    dtype: str | None = option(
        "cast to fp32, fp16 or bf16; whole numbers stay", title=_WRITTEN, needs="convert"
    )
    shard_size: str | None = option(
        "cut the model into files of at most this size, such as 5GB, with an index as on Hugging Face",
        title=_WRITTEN,
        needs="convert",
        metavar="SIZE",
        flags=("--shard_size", "--max_shard_size"),
    )
    target_keys: tuple[str, ...] | None = option(
        f"cast and list only tensors with {_TEXTS}",
        title=_NAMES,
        flags=("--target_keys", "--dtype_target_keys"),
        needs=("dtype", "inspect"),
        hint=_TO_SAY_WHICH,
    )
    exclude_keys: tuple[str, ...] | None = option(
        f"do not cast or list tensors with {_TEXTS}",
        title=_NAMES,
        flags=("--exclude_keys", "--dtype_exclude_keys"),
        needs=("dtype", "inspect"),
        hint=_TO_SAY_WHICH,
    )
    full_target_keys: tuple[str, ...] | None = option(
        f"write only tensors with {_TEXTS}", title=_NAMES, needs="convert"
    )
    full_exclude_keys: tuple[str, ...] | None = option(
        f"do not write tensors with {_TEXTS}", title=_NAMES, needs="convert"
    )
    strip_prefix: tuple[str, ...] | None = option(
        "cut these off the beginnings of names, one after the other: model.diffusion_model.",
        title=_NAMES,
        needs="convert",
    )
    add_prefix: str | None = option("put this before all names", title=_NAMES, needs="convert")
    weights_only: str = option(
        "only true: .pt files are read without running code in them", title=_SAFETY, default="true"
    )
    disable_weights_only: bool = option("refused: code in a file is never run", title=_SAFETY)

    def __post_init__(self) -> None:
        weights_only = self.weights_only.strip().lower()
        if self.disable_weights_only or weights_only in {"false", "no", "0"}:
            flag = "--disable_weights_only" if self.disable_weights_only else "--weights_only false"
            raise OptionError(f"{flag}: {_NO_CODE}. Ask for a safetensors version of the file")
        if weights_only not in {"true", "yes", "1"}:
            raise OptionError(f"--weights_only {self.weights_only}: only true can be used: {_NO_CODE}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise _no_dtype(self.dtype)
        for name in ("target_keys", "exclude_keys", "full_target_keys", "full_exclude_keys"):
            if "" in (getattr(self, name) or ()):
                raise OptionError(f"--{name}: an empty text is in every name. Leave it out")
        if self.shard_size is not None:
            read_shard_size("--shard_size", self.shard_size)

    @property
    def shard_bytes(self) -> int:
        """Return the largest size of a file, in bytes; 0: the model is not cut."""
        return 0 if self.shard_size is None else read_shard_size("--shard_size", self.shard_size)


def _no_dtype(name: str) -> OptionError:
    if "8" in name:
        return OptionError(
            f"--dtype {name}: weights in 8 bits are not written. Load the file with --fp8_scaled, or use "
            "fp16 or bf16"
        )
    guess = did_you_mean(name, DTYPES)
    return OptionError(f"--dtype {name} is no dtype. Use fp32, fp16 or bf16.{guess}")
