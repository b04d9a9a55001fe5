"""Commands that messages tell to type, and what is said of mistyped ones and of many lines."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modules import command
from modules.control_codes import escape_control_codes
from modules.errors import CheckpointError
from modules.parser import Parser
from tests.commands import ROOT


def _parser() -> Parser:
    parser = Parser(prog="make.py")
    parser.add_argument("--prompt")
    parser.add_argument("--save_path", required=True, help="folder, 90%% full")
    parser.add_argument("--codec", choices=["h264", "prores"])
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--fast", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # not that --save_path is missing
        ("--save-path videos", "Unknown option --save-path. Did you mean --save_path?"),
        (
            "--promt=cat --zzz",
            "Unknown option --promt. Did you mean --prompt? Unknown option --zzz. Leave it out.",
        ),
        ("-prompt cat", "Unknown option -prompt. Did you mean --prompt?"),
        ("--prompt -dark", "-dark is no option. A value that begins with - goes behind =: --prompt=-dark"),
        (
            "--strength -1e-4",
            "-1e-4 is no option. A value that begins with - goes behind =: --strength=-1e-4",
        ),
        ("--fast --promt -1", "Unknown option --promt. Did you mean --prompt?"),
        ("--save_path", "argument --save_path: expected one argument"),
        (
            "--save_path x --codec prorse",
            "argument --codec: prorse is no choice. Use h264, prores. Did you mean prores?",
        ),
        ("--save_path x --layers one", "argument --layers: one is not a whole number. Give one, such as 1."),
        ("--save_path x --prompt a cat", "cat belongs to no option. Put a text with blanks in quotes."),
        ("--prompt cat", "--save_path is missing: folder, 90% full"),
    ],
)
def test_a_mistake_is_one_message(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"make.py: error: {message}\nmake.py --help lists all options\n"


@pytest.mark.parametrize("sign", ["\\", "^", "`", " "])
def test_the_line_end_of_another_shell_is_told(sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--fast"], ["--prompt", "a cat"], []):
        with pytest.raises(SystemExit):
            _parser().parse_args([*words, sign])
        assert f"the command ends in '{sign}', and its next line was not read" in capsys.readouterr().err
    assert _parser().parse_args(["--save_path", "x", "--prompt", sign]).prompt == sign


@pytest.mark.parametrize("words", [["--help", "--promt"], ["-h", "more"]])
def test_help_is_given_whatever_else_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(words)
    assert end.value.code == 0
    assert "--layers" in capsys.readouterr().out


def test_beginnings_of_options_and_values_like_options_are_taken_as_before() -> None:
    args = _parser().parse_args(["--save", "x", "--pro=--cat", "--layers", "-1", "2"])
    assert (args.save_path, args.prompt, args.layers) == ("x", "--cat", [-1, 2])
    for text in ("--no option of ours", "- a cat", "-w=3 cats", "--w=3 cats", "-1", "-.5"):
        assert _parser().parse_args(["--save_path", text]).save_path == text
    assert _parser().parse_args(["--save_path", "x", "--strength=-1e-4"]).strength == -1e-4


@pytest.mark.parametrize(
    ("system", "typed"),
    [
        ("posix", r"python x.py --vae 'models/my vae.pt' --dataset_config 'C:\d.toml'"),
        # cmd knows no single quotes
        ("nt", r'python x.py --vae "models/my vae.pt" --dataset_config C:\d.toml'),
    ],
)
def test_commands_are_quoted_for_the_shell_of_the_system(
    monkeypatch: pytest.MonkeyPatch, system: str, typed: str
) -> None:
    monkeypatch.setattr(command.os, "name", system)
    words = ["python", "x.py", "--vae", "models/my vae.pt", "--dataset_config", r"C:\d.toml"]
    assert command.as_typed(words) == typed


def test_a_warning_is_not_shown_again_within_the_block(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a module")

    def speak() -> None:
        for number in (1, 2, 1):
            logger.warning("%d is ignored", number)
            logger.error("line %d is skipped", number)

    with command.each_warning_once():
        speak()
    assert [message.split()[0] for message in caplog.messages] == ["1", "line", "2", "line", "line"]
    caplog.clear()
    speak()
    assert len(caplog.messages) == 6


ATTACK = "a\x1b[2Jb\x1b]0;title\x07c\x9bd\re\x7f \u202egpj.exe\u202c \u2066x\ud800"
SHOWN = r"a\x1b[2Jb\x1b]0;title\x07c\x9bd\re\x7f \u202egpj.exe\u202c \u2066x\ud800".replace(r"\r", r"\x0d")


def test_control_codes_are_written_out_and_letters_of_every_language_stay() -> None:
    assert escape_control_codes(ATTACK) == SHOWN
    plain = "Käfer 猫 עברית 🐈\u200d⬛\n  two lines\tand a tab"
    assert escape_control_codes(plain) == plain


def test_a_message_of_the_log_holds_no_control_codes_but_its_colour() -> None:
    handler = logging.StreamHandler()
    for colour, around in ((False, ("", "")), (True, ("\033[33m", "\033[0m"))):
        handler.setFormatter(command._LineFormatter(colour))
        record = logging.makeLogRecord(
            {"msg": "%s is ignored", "args": (ATTACK,), "levelno": logging.WARNING, "levelname": "WARNING"}
        )
        assert handler.format(record) == f"{around[0]}WARNING: {SHOWN} is ignored{around[1]}"


def test_the_message_of_an_error_holds_no_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(f"{ATTACK}.safetensors")

    def fail() -> None:
        raise CheckpointError(f"{path}: damaged.\n  Copy it again.", path)

    with pytest.raises(SystemExit):
        command.command_line(fail, lambda path: f"it looks like \x1b[31m{path.name}")
    assert capsys.readouterr().err.splitlines() == [
        f"CheckpointError: {SHOWN}.safetensors: damaged.",
        "  Copy it again.",
        rf"  {SHOWN}.safetensors: it looks like \x1b[31m{SHOWN}.safetensors.",
    ]


def test_a_mistyped_option_is_shown_without_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["--save_path", "x", "--layers", ATTACK])
    assert "\x1b" not in capsys.readouterr().err


def test_a_hint_does_not_say_again_what_a_file_looks_like(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise CheckpointError("a.pth is no upscaler; it looks like a VAE (--vae).", Path("a.pth"))

    with pytest.raises(SystemExit):
        command.command_line(fail, lambda path: "it looks like the Wan2.1 VAE (--vae)")

    assert capsys.readouterr().err.count("looks like") == 1


@pytest.mark.parametrize("word", ["-h", "--he", "--help"])
def test_help_is_shown_whatever_stands_beside_it(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    for parse in (_parser().parse_args, _parser().parse_known_args):
        with pytest.raises(SystemExit) as end:
            parse(["--fast", word, "--unknown"])
        assert end.value.code in {0, None}
        assert capsys.readouterr().out.startswith("usage: make.py")


@pytest.mark.skipif(os.name == "nt", reason="a signal to one process elsewhere")
def test_ctrl_c_while_a_program_ends_prints_no_traceback() -> None:
    code = (
        "import threading, time; from modules.command import command_line\n"
        "command_line(threading.Thread(target=time.sleep, args=[60]).start, needs_packages=False)\n"
        "print('ending', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors == ""
