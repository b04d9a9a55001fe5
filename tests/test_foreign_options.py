"""Every option of every script, typed into each other one: the right counterpart, or none and no guess."""

import functools
import re
from collections.abc import Collection
from importlib.metadata import entry_points

import pytest

from modules import mistyped
from modules.option_tables import list_option_names
from modules.parser import Parser
from tests.test_command_line import parser_of
from tests.test_imports import SCRIPTS, TOOLS

# one of each kind daily, the others at night
DAILY = {
    *("gen_img.py", "minimax_h3_generate_video.py", "wan_generate_video.py", "flux_minimal_inference.py"),
    *(
        "wan_train_network.py",
        "train_network.py",
        "wan_cache_latents.py",
        "convert_lora.py",
        "new_project.py",
    ),
}
NAMES = list_option_names()
GUESS = re.compile(r"Did you mean --([\w-]+)")
REASONS = (
    " It belongs to other scripts, and nothing here corresponds to it. Omit it.",
    " Omit it: ",
    " Pass --",  # a file of the same role
)


def means_the_same(typed: str, ours: str, known_as: Collection[str]) -> bool:
    """Whether a table or the option says so: names that share letters are in none."""
    theirs = (line.partition(":") for line in mistyped._FOREIGN_OPTIONS.splitlines())
    lines = ("+".join(line.split()).split("+") for line in mistyped._SYNONYMS.splitlines())
    is_theirs = any(name == ours and typed in names.split() for name, _, names in theirs)
    return typed in known_as or is_theirs or any(typed in line and ours in line for line in lines)


@pytest.mark.parametrize(
    "script",
    [pytest.param(name, marks=[] if name in DAILY else [pytest.mark.slow]) for name in (*SCRIPTS, *TOOLS)],
)
def test_an_option_of_another_script_gets_its_counterpart_or_no_guess(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # which packages are installed is read for each unknown name, a thousand here
    monkeypatch.setattr(mistyped, "entry_points", functools.cache(entry_points))
    parser = parser_of(script, monkeypatch)
    assert isinstance(parser, Parser)
    keys = {key for file in parser.key_files for key in file.read_keys()}
    for name in NAMES:
        message = parser._explain_unknown("", f"--{name}").removeprefix(f"Unknown option --{name}.")
        if not message or parser._option_string_actions.get(f"--{name.replace('_', '-')}"):
            continue  # an option of its own, or the beginning of one, as argparse takes it
        guess = GUESS.search(message)
        if guess:
            action = parser._option_string_actions[f"--{guess[1]}"]
            known_as = getattr(action, "known_as", ())
            assert means_the_same(name, guess[1].replace("-", "_"), known_as), message
        else:
            assert message.startswith(REASONS) or any(key in message for key in keys), message


@pytest.mark.parametrize(
    ("script", "typed", "message"),
    [
        ("gen_img.py", "lora_weight", "Did you mean --network_weights?"),
        ("gen_img.py", "lora_multiplier", "Did you mean --network_mul?"),
        ("gen_img.py", "save_path", "Did you mean --outdir?"),
        ("sdxl_gen_img.py", "image_size", "Did you mean --H HEIGHT --W WIDTH?"),
        ("flux_minimal_inference.py", "video_size", "Did you mean --height HEIGHT --width WIDTH?"),
        ("flux_generate_image.py", "W", "Did you mean --image_size HEIGHT WIDTH?"),
        ("minimax_h3_generate_video.py", "control_image_path", "Did you mean --ref?"),
        ("wan_generate_video.py", "network_weights", "Did you mean --lora_weight?"),
        ("wan_generate_video.py", "stg_scale", "It belongs to other scripts, and nothing here"),
        ("convert_lora.py", "prompt", "It belongs to other scripts, and nothing here"),
        ("wan_generate_video.py", "promt", "Did you mean --prompt?"),
        ("new_project.py", "dit", "It is a file of the model: pass it to `new`, as --model_file dit=FILE."),
        ("new_project.py", "ckpt", "It is a file of the model: pass it to `new`, as --model_file ckpt=FILE."),
        (
            "new_project.py",
            "pretrained_model_name_or_path",
            "It is a file of the model: pass it to `new`, as --model_file ckpt=FILE.",
        ),
        ("run_project.py", "vae", "It is a file of the model: pass it to `new`, as --model_file vae=FILE."),
        ("run_project.py", "family", "`new` has it, which describes the folder: type `new` again with"),
        ("wan_generate_video.py", "qwertz", "Omit it."),
    ],
)
def test_known_counterparts(script: str, typed: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(script, monkeypatch)
    assert isinstance(parser, Parser)
    assert f"Unknown option --{typed}. {message}" in parser._explain_unknown("", f"--{typed}")


@pytest.mark.parametrize(
    ("typed", "ours"),
    [("dpm++_2m", "dpmsolver++"), ("DPM++ 2M Karras", "dpmsolver++"), ("euler_ancestral", "euler_a")],
)
def test_samplers_of_other_programs_get_their_counterpart(
    typed: str, ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="make.py")
    parser.add_argument("--sampler", choices=["dpm_2", "dpmsolver++", "euler", "euler_a"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--sampler", typed])
    assert f"Did you mean {ours}?" in capsys.readouterr().err
