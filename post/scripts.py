"""Make the script of a tool: read the command line, then run the chain."""

from collections.abc import Sequence

from contract.families import Script
from post.chain_options import read_chain


def tool_script(tool: str, about: str | None) -> Script:
    """Return the `Script` of a tool; `about` is the script's docstring."""

    def run_tool(argv: Sequence[str] | None = None) -> None:
        chain = read_chain(tool, about or "", argv)

        from post.run import run_chain  # loads torch, after every option has been read

        run_chain(chain)

    return Script(run_tool)
