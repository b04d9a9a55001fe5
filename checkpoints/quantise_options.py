"""Options of tools/quantise.py. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option
from modules.output_files import check_output_file, check_place

GGUF = "q8_0"
FORMS = ("int8", "convrot", "fp8", GGUF, "bf16")


class QuantiseOptions(Options):
    """Options of `tools/quantise.py`."""

    model: Path = option(
        "transformer or text encoder in 16 or 32 bits: a file, one of its shards, an index, or a folder; for "
        "--form bf16 a quantised one",
        place="there",
        required=True,
        by_place=True,
        flags=("--model", "--input"),
    )
    form: str = option(
        "int8: a scale for each row; convrot: the same, rotated so that outliers cost nothing; fp8: a scale "
        "for each weight; all three in ComfyUI's layout. q8_0: GGUF, of transformers. bf16: back to 16 bits",
        choices=FORMS,
        refused={
            "nf4": "its scales are stored in a form of ours that no other program reads; --nf4_base "
            "rounds to 4 bits while the model loads",
        },
        required=True,
    )
    output: Path = option("file to write: .safetensors, with --form q8_0 .gguf", required=True, by_place=True)
    device: str | None = option("device that rounds; default: CUDA if available, else the CPU")

    def __post_init__(self) -> None:
        if self.form != GGUF:
            check_output_file("--output", self.output)
        elif self.output.suffix.lower() != ".gguf":
            raise OptionError(
                f"--output {self.output}: a GGUF file is written. Give a name that ends in .gguf"
            )
        else:
            check_place("--output", self.output)
