"""An account that belongs to the tests alone: nothing that this user has set, kept or loaded reaches them."""

import os
import re
import shutil
import tempfile
from pathlib import Path

# Variables with which an account, a launcher, a terminal or the page's queue changes what programs do:
# addresses and logins of hubs, proxies, folders of libraries, places of several processes, the width of help.
CHANGES_PROGRAMS = re.compile(
    r"(HF|HUGGING_?FACE|MODELSCOPE|TRANSFORMERS|DIFFUSERS|XDG|MPL|WANDB|SLURM|GIT)_\w+"
    r"|REELSMITH_(FROM_QUEUE|PROGRESS|DRIVEN|RUN_\w+|ONLY_OPTIONS|STARTED_IN)"
    r"|MPLBACKEND|\w+_proxy|\w+_ENDPOINT|MODEL_BASE|TORCH_HOME"
    r"|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|COLUMNS|LINES",
    re.IGNORECASE,
)
# `tests.commands.QUIET` has the same word for commands in processes of their own; no test needs the network
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# a clone may be another account's, as in a container, which git refuses to read otherwise
GIT = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
HOMES = ("HOME", "USERPROFILE", "XDG_STATE_HOME", "LOCALAPPDATA", "APPDATA")


def enter_new_account() -> Path:
    """Give this process, and those that it starts, a new home folder and no settings of the user.

    Call it before libraries are imported, which look at them once.

    Returns:
        The home folder, for `leave_account`. Its name has a blank and an umlaut.
    """
    for name in [name for name in os.environ if CHANGES_PROGRAMS.fullmatch(name)]:
        del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="home ü "))
    os.environ.update(dict.fromkeys(HOMES, str(home)), **OFFLINE, **GIT)
    return home


def leave_account(home: Path) -> None:
    """Remove the home folder with all that programs have left there."""
    shutil.rmtree(home, ignore_errors=True)
