"""The option of tools that finished videos go through before they are written. Standard library only."""

import functools

from modules.options import OF_DECODING, Options, option
from post.chain_options import THEN, ToolOptions, hiding_tool, in_words, read_tools, tool_names

POST = "--post"


class PostOptions(Options, title="tools for finished videos"):
    """Tools that work on decoded frames."""

    post: tuple[str, ...] | None = option(
        f"a tool that decoded frames go through before they are written, in one text with its options: "
        f'"upscaler model=x.pth scale=2". The tools: {tool_names()}; "upscaler --help" lists the options of '
        f"one. May be repeated, or hold several with {THEN} between them. Latents and what is recorded of "
        "size and rate stay those of the generation, and so does NAME_last.png, to continue from, unless a "
        "tool hides something (yolo_blur)",
        action="append",
        nargs=None,
        metavar="TOOL ...",
        facts=OF_DECODING,
    )

    def __post_init__(self) -> None:
        _ = self.tools  # raises OptionError

    @functools.cached_property
    def tools(self) -> tuple[ToolOptions, ...]:
        """The tools in the order of work, each with its options."""
        return tuple(tool for text in self.post or () for tool in read_tools(text, POST))

    @property
    def hiding(self) -> str | None:
        """The name of the first tool that hides something; None if there is none."""
        return hiding_tool(self.tools)

    @property
    def in_words(self) -> str | None:
        """What the tools do, as metadata keep it: without folders. None without a tool."""
        return f" {THEN} ".join(in_words(tool, options) for tool, options in self.tools) or None
