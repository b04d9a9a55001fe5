"""Options of prompts that a chat model writes anew. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import NO_PIXELS, Options, option

MODES = ("normal", "master")


class PromptRewriteOptions(Options, title="prompts that a chat model rewrites"):
    """How prompts are rewritten before they are encoded."""

    # outputs record the text that came of these
    prompt_rewrite: str | None = option(
        "have a chat model describe what the prompt asks for, in English: normal keeps every detail, master "
        "adds composition, light and camera",
        choices=MODES,
        facts=NO_PIXELS,
        needs="prompt_rewrite_model",
        hint="the folder of a chat model",
    )
    prompt_rewrite_model: Path | None = option(
        "folder of the chat model; needs the package transformers",
        facts=NO_PIXELS,
        needs="prompt_rewrite",
        hint="normal or master",
    )

    def __post_init__(self) -> None:
        model = self.prompt_rewrite_model
        if model is not None and not (model / "config.json").is_file():
            raise OptionError(
                f"--prompt_rewrite_model {model}: no folder with a config.json. Give the folder of a chat "
                "model in the layout of transformers"
            )
