"""Make the LoRA tools: read the options of one, then call what does its work."""

from collections.abc import Collection, Sequence

from modules.families import Script
from modules.installation import import_own
from modules.options import Options
from modules.parser import parse_options


def lora_tool(about: str | None, work: str, *records: type[Options], without: Collection[str] = ()) -> Script:
    """Return the script of a LoRA tool.

    about: its docstring. work: the function that takes the first record, as `networks.merging.merge_flux`,
    with which torch loads. without: as for `add_options`.
    """

    def run_tool(argv: Sequence[str] | None = None) -> None:
        options, *_ = parse_options(about, argv, *records, without=without)
        room, _, function = work.rpartition(".")
        getattr(import_own(room), function)(options)

    return Script(run_tool)
