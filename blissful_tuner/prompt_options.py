"""Options of changes to prompts before they are encoded. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option


class PromptOptions(Options, title="prompts"):
    """How to read the texts of a video: wildcards to draw, and weights of parts."""

    prompt_wildcards: Path | None = option(
        "folder of text files: __name__ in a prompt becomes a line of name.txt, drawn by the seed"
    )
    prompt_alternatives: bool = option(
        "{red|blue} in a prompt becomes one of them, drawn by the seed; {3::red|blue} draws red 3 times as "
        "often"
    )
    prompt_weighting: bool = option(
        "(word:1.4) in a prompt multiplies what the model is given for that part; (word) means 1.1, "
        "\\( a parenthesis"
    )

    def __post_init__(self) -> None:
        folder = self.prompt_wildcards
        if folder is not None and not folder.is_dir():
            what = "it is not a folder" if folder.exists() else "there is no such folder"
            raise OptionError(
                f"--prompt_wildcards {folder}: {what}. Give the folder of the text files that __name__ in a "
                "prompt draws from"
            )

    @property
    def draws(self) -> bool:
        """Whether parts of prompts may be drawn."""
        return self.prompt_wildcards is not None or self.prompt_alternatives


PLAIN_PROMPTS = PromptOptions()
