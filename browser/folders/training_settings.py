"""The options of a training script as the page shows them, from its compiled table."""

import functools
import re
import shlex
from collections.abc import Sequence
from typing import Any

import tomlkit

from modules.errors import OptionError
from modules.help_text import DescribedOption, describe_options
from modules.installation import find_script
from modules.option_tables import find_table
from modules.pages.language import TranslatableText, say
from modules.table_parser import build_parser
from project.run_options import STARTING

NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
# options that end a run before training
OPTIONS_WITHOUT_TRAINING = (
    "check",
    "html",
    "show_timesteps",
    "plan",
    "debug_dataset",
    "debug_mode",
    "output_config",
)
# the first two name the file itself; the others are only used on the command line
NOT_SHOWN = {"config_file", "help", *OPTIONS_WITHOUT_TRAINING, "repair_captions", *STARTING}


class Setting(DescribedOption):
    """An option of a training script, as the page shows it."""

    @property
    def about(self) -> TranslatableText:
        """First sentence of the option's help text, which is translated."""
        return say(re.split(r"(?<!e\.g)\. ", self.help)[0])

    def convert(self, text: str) -> Any:
        """Return the TOML value of a typed text. Raises OptionError if a quote is not closed.

        Anything but a valid number or choice becomes a string: the script's error explains what it accepts.
        """
        if self.kind == "switch" and text in ("true", "false"):
            return text == "true"
        if not self.is_list:
            return self._convert_word(text)
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise OptionError(f"{self.name}: {error}. Quote a value that contains spaces") from None
        return [self._convert_word(word) for word in words]

    def _convert_word(self, text: str) -> Any:
        if self.kind != "text" and NUMBER.fullmatch(text):
            return tomlkit.value(text)
        return text


@functools.lru_cache(maxsize=64)
def read_settings(script: str) -> Sequence[Setting]:
    """Return all options of a training script. Raises OptionError if it is not a script with options."""
    table = find_table(find_script(script))
    if table is None:
        raise OptionError(f"{script}: there is no such script")
    return [
        Setting(**vars(option))
        for option in describe_options(build_parser(table, script))
        if option.rejection is None and option.name not in NOT_SHOWN
    ]
