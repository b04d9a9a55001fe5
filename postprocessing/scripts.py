"""Create the script of a tool: read the command line, then run the chain."""

from collections.abc import Sequence

from postprocessing.chain_options import read_chain
from protocols.families import Script


def tool_script(tool: str, about: str | None) -> Script:
    """Return the `Script` of a tool; `about` is the script's docstring."""

    def run_tool(argv: Sequence[str] | None = None) -> None:
        chain = read_chain(tool, about or "", argv)

        from postprocessing.run import run_chain  # loads torch, after every option has been read

        run_chain(chain)

    return Script(run_tool)
