"""Make the scripts of the tools for finished videos: read the options, then run the tools."""

from collections.abc import Sequence

from modules.families import Script
from post.chain_options import read_chain


def tool_script(tool: str, about: str | None) -> Script:
    """Return the script of a tool. about: the script's docstring."""

    def run_tool(argv: Sequence[str] | None = None) -> None:
        chain = read_chain(tool, about or "", argv)

        from post.run import run_chain  # torch loads here, after every option has been read

        run_chain(chain)

    return Script(run_tool)
