"""The words of the command `reelsmith` that name a script, and which scripts are commands of their own.

Standard library only.
"""

import re

# a script's name -> what follows `reelsmith`; other scripts keep their name, with - for _
WORDS = {
    "train_network": "train sd",  # as in sd-scripts
    r"(\w+)_train_network": "train {family}",
    r"(\w+)_train": "finetune {family}",
    r"(\w+)_generate_(?:video|image)": "generate {family}",
    r"(?:(\w+)_)?cache_latents": "cache latents {family}",
    r"(?:(\w+)_)?cache_text_encoder_outputs": "cache text {family}",
    r"(\w+)_(?:lora|project)": "{family}",  # merge, convert, flux-merge; new, run
    r"run_(browser)": "{family}",
}
FAMILY = "hv"  # family of scripts without one in their name
# scripts of a model without words of their own
MODEL_SCRIPT = re.compile(r"\w+_minimal_inference")


def name_words(script: str) -> str:
    """Return the words after `reelsmith` that run a script: `train wan` for wan_train_network."""
    for pattern, words in WORDS.items():
        match = re.fullmatch(pattern, script)
        if match:
            family = (match[1] if match.re.groups else None) or FAMILY
            return words.format(family=family.replace("_", "-"))
    return script.replace("_", "-")


def has_own_command(script: str) -> bool:
    """Return whether the package installs a console command with the script's name.

    Scripts of a model have one. Generic names such as `compare` and `download` would hide other programs on
    the PATH, so these scripts only run as `reelsmith compare`.
    """
    return " " in name_words(script) or MODEL_SCRIPT.fullmatch(script) is not None


def console_words(script: str) -> list[str]:
    """Return the words that run a script of the installed package: its own command, else `reelsmith NAME`."""
    return [script] if has_own_command(script) else ["reelsmith", *name_words(script).split()]
