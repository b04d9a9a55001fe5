"""The option of tools that finished videos go through before they are written. Standard library only."""

import functools
from typing import Any

from modules.installation import import_own
from modules.options import OF_DECODING, Options, option

POST = "--post"


class PostOptions(Options, title="tools for finished videos"):
    """Tools that work on decoded frames."""

    post: tuple[str, ...] | None = option(
        "a tool that decoded frames go through before they are written, in one text with its options: "
        '"upscaler model=x.pth scale=2". The tools: upscaler, GIMMVFI, facefix or yolo_blur; "upscaler '
        '--help" lists the options of one. May be repeated, or hold several with --then between them. '
        "Latents and what is recorded of size and rate stay those of the generation, and so does "
        "NAME_last.png, to continue from, unless a tool hides something (yolo_blur)",
        action="append",
        nargs=None,
        metavar="TOOL ...",
        facts=OF_DECODING,
    )

    def __post_init__(self) -> None:
        _ = self.tools  # raises OptionError

    @functools.cached_property
    def tools(self) -> Any:
        """The tools in the order of work, as `post.chain_options.AskedTools`; None without a tool.

        `post` is imported by its name, and only for this option: a training makes samples through these loops
        and has no use for it.
        """
        return import_own("post.chain_options").read_asked(self.post, POST) if self.post else None
