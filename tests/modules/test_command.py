"""Commands that messages tell to type, what is said of mistyped ones; boxes, and bars of long loops."""

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from modules import command
from modules.bars import BYTES, FRAMES, LINE_INTERVAL, Bar
from modules.command import LAUNCHER_VARIABLES, command_line, name_as_typed
from modules.console import draw_box, format_count, format_duration, format_size, pluralize, show_box
from modules.control_codes import escape_control_codes, wrap_text
from modules.error_output import extract_error_message
from modules.errors import CheckpointError, OptionError
from modules.parser import Parser, typed_names
from tests.commands import ROOT, run_program
from tests.faults.messages import assert_one_message, run_here
from tests.waiting import PATIENCE


def _parser() -> Parser:
    parser = Parser(prog="make.py")
    parser.add_argument("--prompt")
    parser.add_argument("--save_path", required=True, help="folder, 90%% full")
    parser.add_argument("--codec", choices=["h264", "prores"])
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--size", type=int, nargs="+", metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--fast", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # not that --save_path is missing
        ("--save-pth videos", "Unknown option --save-pth. Did you mean --save_path?"),
        (
            "-prompt a --zz",
            "Unknown option -prompt. Did you mean --prompt? Unknown option --zz. Omit it.",
        ),
        (
            "--prompt -dark",
            "-dark is not an option. A value that begins with - goes after =: --prompt=-dark",
        ),
        ("--fast --promt -1", "Unknown option --promt. Did you mean --prompt?"),
        ("--save_path", "argument --save_path: expected one argument"),
        (
            "--save_path x --codec prorse",
            "argument --codec: prorse is not a choice. Use h264, prores. Did you mean prores?",
        ),
        ("--size 832x480", "--size 832x480: use height and width: --size 480 832"),
        ("--size=832×480", "--size 832×480: use height and width: --size 480 832"),
        ("--size 480,832", "--size 480,832: use height and width: --size 480 832"),
        ("--save_path x --layers one", "argument --layers: one is not a whole number. Pass one, such as 1."),
        (
            "--save_path x --layers \x1b[2J",
            r"argument --layers: \x1b[2J is not a whole number. Pass one, such as 1.",
        ),
        ("--save_path x --prompt a cat", "cat belongs to no option. Put a text with spaces in quotes."),
        ("--prompt cat", "--save_path is missing: folder, 90% full"),
    ],
)
def test_a_mistake_is_one_message(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"make.py: error: {message}\nmake.py --help lists all options\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tools/split_video.py x.mpp --output made", "--input x.mpp: no such file. Did you mean x.mp4?"),
        ("tools/split_video.py x.mp4", "--output is missing"),
        (
            "tools/dataset_report.py --output p.html folder",
            "folder is a folder. Pass folder/dataset.toml",
        ),
        ("tools/dataset_report.py --output p.html .", ". is a folder. Pass a .toml or .json file: "),
        ("wan_cache_latents.py --vae v none.toml", "none.toml cannot be read: No such file"),
        ("convert_lora.py x.mp4 --output y.safetensors --target other", "x.mp4"),
        ("blissful_tuner/video_to_png.py nix.mp4", "nix.mp4"),
        ("tools/split_video.py x.mp4 y.mp4 --output made", "2 words without an option, and only --input can"),
        ("tools/split_video.py none.mp4 made", "--input none.mp4: no such file"),
        (
            "tools/split_video.py -x.mp4 made",
            "Unknown option -x.mp4. For the file of this name, write ./-x.mp4",
        ),
        ("tools/split_video.py -- -z.mp4 made", "--input -z.mp4: no such file"),
        ("convert_lora.py other --output y.safetensors --target other", "--input other: no such file"),
        ("convert_lora.py a b c --target other", "3 words without an option, and only --input and --output"),
        ("tools/compare.py folder --prompt x", "--lora folder is a folder: pass folder/*.safetensors"),
        ("tools/split_video.py --input x.mp4 y.mp4 --output made", "--input takes one path but got 2"),
    ],
)
def test_a_word_without_an_option_is_what_the_tool_is_for(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("x.mp4", "y.mp4", "-x.mp4", "other.toml", "folder/dataset.toml"):
        (tmp_path / name).write_text("", encoding="utf-8")
    code, said = run_here(*words.split(), folder=tmp_path)
    assert message in assert_one_message(code, said, remedy=False)


@pytest.mark.parametrize("sign", ["\\", "^", "`", " "])
def test_the_line_end_of_another_shell_is_told(sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--fast"], ["--prompt", "a cat"], []):
        with pytest.raises(SystemExit):
            _parser().parse_args([*words, sign])
        assert f"the command ends in '{sign}', and its next line was not read" in capsys.readouterr().err
    assert _parser().parse_args(["--save_path", "x", "--prompt", sign]).prompt == sign


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
    # of this module alone: a path that another thread makes would be of a system that is not here
    monkeypatch.setattr(command, "os", SimpleNamespace(name=system, environ={}))
    words = ["python", "x.py", "--vae", "models/my vae.pt", "--dataset_config", r"C:\d.toml"]
    assert command.quote_command(words) == typed


def test_a_warning_is_not_shown_again_within_the_block(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a module")

    def speak() -> None:
        for number in (1, 2, 1):
            logger.warning("%d is ignored", number)
            logger.error("line %d is skipped", number)

    with command.drop_repeated_warnings():
        speak()
    assert [message.split()[0] for message in caplog.messages] == ["1", "line", "2", "line", "line"]
    caplog.clear()
    speak()
    assert len(caplog.messages) == 6


ATTACK = "a\x1b[2Jb\x1b]0;title\x07c\x9bd\re\x7f \u202egpj.exe\u202c \u2066x\ud800"
SHOWN = r"a\x1b[2Jb\x1b]0;title\x07c\x9bd\re\x7f \u202egpj.exe\u202c \u2066x\ud800".replace(r"\r", r"\x0d")


def test_options_are_named_as_they_were_typed_and_commands_stay(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    names = {"--nf4_base": "--nf4", "--control_path": "--src_video", "--attn_mode flash": "--flash_attn"}
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    root.addHandler(handler)
    try:
        with name_as_typed(names):
            root.warning("--nf4_base_x %s: --nf4_base is not --control_path.", "a")
            root.warning("no\n  python krea2_train_network.py --nf4_base")
            root.warning("--attn_mode flash, --attn_mode flash3")
        with pytest.raises(OptionError, match="^--src_video nix.mp4: --nf4 has"), name_as_typed(names):
            raise OptionError("--control_path nix.mp4: --nf4_base has")
        root.warning("--nf4_base")
    finally:
        root.removeHandler(handler)

    assert shown.getvalue().splitlines() == [
        "--nf4_base_x a: --nf4 is not --src_video.",
        "no",
        "  python krea2_train_network.py --nf4_base",
        "--flash_attn, --attn_mode flash3",
        "--nf4_base",
    ]


def test_a_faulty_message_of_a_package_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, records = logging.Handler(), list[logging.LogRecord]()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])

    with name_as_typed({"--a": "--b"}):
        logging.getLogger("package").warning("%d --a", "x")

    assert [record.args for record in records] == [("x",)]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--b 1", {"--a": "--b", "--c": "--b"}),
        ("--a 1", {"--b": "--a", "--c": "--a"}),
        ("--long_na 1", {"--other": "--long_name"}),
        ("--a 1 --b 2", {"--c": "--a"}),
        ("", {}),
    ],
)
def test_the_typed_flag_stands_for_the_others_of_its_option(words: str, names: dict[str, str]) -> None:
    parser = Parser(prog="make.py")
    parser.add_argument("--a", "--b", "--c", "-d", type=int)
    parser.add_argument("--other", "--long_name", type=int)

    assert typed_names(parser.parse_args(words.split())) == names


def test_control_codes_are_written_out_and_letters_of_every_language_stay() -> None:
    assert escape_control_codes(ATTACK) == SHOWN
    plain = "Käfer 猫 עברית 🐈\u200d⬛\n  two lines\tand a tab"
    assert escape_control_codes(plain) == plain


@pytest.mark.parametrize(("colour", "around"), [(False, ("", "")), (True, ("\033[33m", "\033[0m"))])
def test_a_message_of_the_log_holds_no_control_codes_but_its_colour(
    colour: bool, around: tuple[str, str]
) -> None:
    said = {"msg": "%s is ignored", "args": (ATTACK,), "levelno": logging.WARNING, "levelname": "WARNING"}

    shown = command._LineFormatter(colour).format(logging.makeLogRecord(said))

    assert shown == f"{around[0]}WARNING: {SHOWN} is ignored{around[1]}"


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("damaged", ["  %s: it looks like \\x1b[31m%s."]),
        ("it looks like a VAE", []),  # not said again
    ],
)
def test_the_message_of_an_error_holds_no_control_codes(
    reason: str, hint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(f"{ATTACK}.safetensors")

    def fail() -> None:
        raise CheckpointError(f"{path}: {reason}.\n  Copy it again.", path)

    with pytest.raises(SystemExit):
        command.command_line(fail, lambda path: f"it looks like \x1b[31m{path.name}")
    assert capsys.readouterr().err.splitlines() == [
        f"CheckpointError: {SHOWN}.safetensors: {reason}.",
        "  Copy it again.",
        *(line.replace("%s", f"{SHOWN}.safetensors") for line in hint),
    ]


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
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert errors == ""


@pytest.mark.skipif(os.name == "nt", reason="streams are closed by a shell of another system")
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_without_streams_a_program_runs_and_its_files_hold_no_messages(closed: str, tmp_path: Path) -> None:
    file = tmp_path / "result"
    code = (
        "import sys; from modules.command import command_line\n"
        "def main():\n"
        f"  with open({str(file)!r}, 'w') as file:\n"
        "    print('to be seen', file=sys.stderr); file.write('result')\n"
        "command_line(main, needs_packages=False)"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], cwd=ROOT)
    assert (done.returncode, file.read_text(encoding="utf-8")) == (0, "result")


def _compiler_error(text: str) -> Exception:
    kind = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    return kind(text)


CPP_ERROR = """CppCompileError: C++ compile error

Command:
g++ main.cpp -L/tmp/a b/torch/lib

Output:
/usr/bin/ld: cannot find -ltorch: No such file or directory
collect2: error: ld returned 1 exit status
"""


@pytest.mark.parametrize(
    ("error", "folder", "said"),
    [
        (
            CPP_ERROR,
            "/tmp/a b",
            "compiling the blocks failed: /usr/bin/ld: cannot find -ltorch: No such file or directory\n"
            "  /tmp/a b has a space in its path, which breaks the compiler's command: use a folder without "
            "one. Or omit --compile, --dynamo_backend and --optimized\n",
        ),
        (
            "ptxas fatal   : Value 'sm_120' is not defined\nmore\n",
            "/tmp/a b",  # no command names it, so that it is not the reason
            "compiling the blocks failed: ptxas fatal   : Value 'sm_120' is not defined\n"
            "  Update the compiler (g++ or clang; on a GPU Triton) and its headers. "
            "Or omit --compile, --dynamo_backend and --optimized\n",
        ),
    ],
)
def test_an_error_of_the_compiler_is_two_lines(
    error: str, folder: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    monkeypatch.setattr(sys, "argv", ["make.py"])

    def fail() -> None:
        raise _compiler_error(error)

    with pytest.raises(SystemExit) as end:
        command_line(fail)
    assert end.value.code == 1
    assert capsys.readouterr().err == f"InductorError: {said}"


def test_other_errors_keep_their_traceback_and_a_terminal_gets_it_in_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make.py"])

    def fail() -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError):
        command_line(fail)
    monkeypatch.setattr(command, "draws_boxes", lambda stream: True)
    with pytest.raises(SystemExit) as end:
        command_line(fail)
    assert end.value.code == 1
    assert "a mistake of ours" in capsys.readouterr().err


def test_a_terminal_is_told_that_torch_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "draws_boxes", lambda stream: True)
    monkeypatch.setitem(sys.modules, "torch", sys)
    command.begin_loading()  # it is there
    assert capsys.readouterr().err == ""
    monkeypatch.delitem(sys.modules, "torch")
    command.begin_loading()
    assert capsys.readouterr().err == "Loading torch ...\n"


@pytest.mark.parametrize(
    "before",
    [
        "WARNING: a\n",
        "Traceback (most recent call last):\n  x\nOSError: a\n\nTraceback (most recent call last):\n  y\n",
    ],
)
def test_the_message_of_a_program_is_told_from_its_head(before: str) -> None:
    said = "data.toml cannot be used:\nKeyError: b\n" + "c" * 3000
    assert extract_error_message(f"{before}DatasetError: {said}\n\nx") == said[:2000]
    for program in ("make.py", "make_it", "reelsmith make", "reelsmith cache text wan"):  # and of the package
        errors = f"gcc: error: x\n{program}: error: no\n{program} --help lists all options\n"
        assert extract_error_message(errors) == "no"
    assert extract_error_message("Killed\n") == "Killed"


def test_ctrl_c_tells_what_stays(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make.py"])
    for stop, said in ((KeyboardInterrupt(), "Interrupted.\n"), (KeyboardInterrupt("a"), "Interrupted. a\n")):

        def fail(stop: KeyboardInterrupt = stop) -> None:
            raise stop

        with pytest.raises(SystemExit) as end:
            command_line(fail)
        assert (end.value.code, capsys.readouterr().err) == (130, said)


@pytest.mark.parametrize(
    ("limit", "work", "said"),
    [
        (
            "-n 12",
            "[os.open('/dev/null', 0) for _ in range(20)]",
            "too many files are open at once. Allow more of them (ulimit -n 4096) and run again.",
        ),
        ("-f 0", "tempfile.gettempdir()", "No usable temporary directory found in"),
    ],
)
def test_a_limit_of_files_is_one_message(limit: str, work: str, said: str) -> None:
    program = "import os, tempfile; from modules.command import command_line\n"
    program += f"command_line(lambda: {work}, needs_packages=False)"
    words = ["sh", "-c", f'ulimit {limit}; exec "$0" -B -c "$1"', sys.executable, program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"OSError: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["x", "", "9" * 5000, "٣", "1.5"])
@pytest.mark.parametrize("name", LAUNCHER_VARIABLES)
def test_what_a_launcher_sets_is_a_number(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: None, needs_packages=False)
    assert end.value.code == 2
    assert f"has {name}=" in capsys.readouterr().err


HOSTILE = "[red]a [bold]cat[/] :smile: \x1b[31m猫"


SENTENCE = "  LTX-2 takes clips of 8n + 1 frames, and the sides of a FramePack clip are multiples of sixteen."
COMMAND = (
    "python wan_cache_latents.py --dataset_config data/dataset.toml --vae models/vae.safetensors --check"
)


def test_lines_end_at_blanks_and_commands_and_paths_stay_whole() -> None:
    path = f"/data/{'x' * 60}/clip.mp4: no caption next to it"
    assert wrap_text("\n".join([SENTENCE, COMMAND, path, "short"]), 60).split("\n") == [
        "  LTX-2 takes clips of 8n + 1 frames, and the sides of a",
        "  FramePack clip are multiples of sixteen.",
        COMMAND,
        f"/data/{'x' * 60}/clip.mp4:",
        "no caption next to it",
        "short",
    ]
    assert wrap_text(SENTENCE, None) == SENTENCE  # no terminal


def test_a_box_is_logged_as_aligned_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    show_box("Training", [("data", "2 clips"), ("files", "a\nb"), ("none", None)], [("Go on", "x 'a b'")])

    assert caplog.messages == ["Training\n  data:  2 clips\n  files: a\n         b\nGo on:\n  x 'a b'"]


@pytest.mark.parametrize("colour", [False, True])
def test_texts_of_the_user_are_shown_as_they_are(colour: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    show_box("\x1b[2J", [("prompt", HOSTILE)])

    drawn = command._LineFormatter(colour, boxes=True).format(caplog.records[0])
    assert r"[red]a [bold]cat[/] :smile: \x1b[31m猫" in drawn
    assert r"\x1b[2J" in drawn
    assert ("\x1b[2m" in drawn) is colour
    assert "\x1b[2J" not in drawn
    assert "\x1b[31m" not in drawn


def test_a_terminal_gets_borders_of_its_width_and_commands_in_one_piece() -> None:
    long = "python x.py " + "y" * 200

    lines = draw_box(
        "Done", [("path", "z" * 150)], ["Next:", f"  {long}"], False, True, columns=60
    ).splitlines()

    assert lines[0].startswith("╭─ Done ─")
    assert {len(line) for line in lines[:-2]} == {60}
    assert "".join(lines).count("z") == 150
    assert lines[-2:] == ["Next:", f"  {long}"]
    assert draw_box("Done", [("a", "b")], [], False, False, columns=60).isascii()  # without line characters


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colors_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert command.wants_color(screen)
    monkeypatch.setenv(variable, value)
    assert not command.wants_color(screen)
    assert command.draws_boxes(screen) is (variable == "NO_COLOR")


@pytest.mark.parametrize(
    ("words", "of_one"),
    [
        ("tables have no item to train on", "1 table has no item to train on"),
        ("columns of m.csv are not read", "1 column of m.csv is not read"),
        ("problems with the masks of t", "1 problem with the masks of t"),
        ("of 20 captions are missing; write them", "1 of 20 captions is missing; write them"),
        ("have a caption that cannot be used", "1 has a caption that cannot be used"),
        ("shards or folders are incomplete", "1 shard or folder is incomplete"),
        ("entries of x cannot be used", "1 entry of x cannot be used"),
    ],
)
def test_words_behind_a_count_fit_one(words: str, of_one: str) -> None:
    assert (pluralize(1, words), pluralize(2, words)) == (of_one, f"2 {words}")


def test_numbers_are_said_as_people_say_them() -> None:
    times = {0.4: "0 s", 99: "99 s", 100: "2 min", 3599: "1 h", 7800: "2 h 10 min", 48 * 3600: "2 d"}
    sizes = {12: "12 bytes", 9.96e3: "10.0 kB", 312e6: "312 MB", 1.44e9: "1.4 GB"}
    assert {seconds: format_duration(seconds) for seconds in times} == times
    assert {size: format_size(size) for size in sizes} == sizes
    assert format_duration(100 * 3600) == "4 d 4 h"
    endless = {format_duration(seconds) for seconds in (1e10, 10**300, float("inf"))}
    assert endless == {f"{10**10 // 86400} d {round(10**10 % 86400 / 3600)} h"}


@pytest.mark.parametrize(
    ("rank", "count", "said"),
    [("2", "2", "RANK=2 and WORLD_SIZE=2"), ("-1", "1", "RANK=-1")],
)
def test_wrong_numbers_of_a_launcher_are_refused_before_anything_waits(
    rank: str, count: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(SystemExit):
        command_line(lambda: None)
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert (format_count(1, "clip"), format_count(0, "clip")) == ("1 clip", "0 clips")
    assert (format_count(2, "batch"), format_count(2, "epoch")) == ("2 batches", "2 epochs")


def test_without_a_terminal_a_line_is_written_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    with Bar(100, "Loading dit\x1b[31m", BYTES, now=lambda: now[0], is_terminal=lambda: False) as bar:
        for moment in (1.0, LINE_INTERVAL, LINE_INTERVAL + 1, 2 * LINE_INTERVAL):
            now[0] = moment
            bar.update(10)

    assert caplog.messages == [
        r"Loading dit\x1b[31m: 20 bytes of 100 bytes, about 2 min left",
        r"Loading dit\x1b[31m: 40 bytes of 100 bytes, about 90 s left",
    ]


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (30, "a.mp4: 20 of 30, 2 frames a second, about 5 s left"),
        (10, "a.mp4: 20 of 10, 2 frames a second, about 0 s left"),  # a header that says too few
        (None, "a.mp4: 20, 2 frames a second"),
    ],
)
def test_a_line_about_frames_has_their_rate(total: float | None, line: str) -> None:
    now = [0.0]
    with Bar(total, "a.mp4", FRAMES, now=lambda: now[0], is_terminal=lambda: False) as bar:
        bar.update(20)
        now[0] = 10.0

        assert bar.line() == line


def test_steps_are_counted_in_words_and_a_bar_may_show_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Bar(300, "sample 1 of 2", is_terminal=lambda: False) as bar:
        bar.update(140)
        assert bar.line().startswith("sample 1 of 2, step 140 of 300, about ")
    with Bar(12, "Encoding", "source", shows_immediately=True, is_terminal=lambda: True):
        assert "Encoding:   0%|" in capsys.readouterr().err
    with Bar(300, "sample 1 of 2", shows_immediately=True, is_terminal=lambda: True):
        assert "sample 1 of 2, step 0 of 300: |" in capsys.readouterr().err


def test_a_bar_appears_after_a_second_and_is_removed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    with Bar(4, "Decoding", "frame", now=lambda: now[0], is_terminal=lambda: True) as bar:
        bar.update()
        assert not capsys.readouterr().err
        now[0] = 1.5
        bar.update()
        shown = capsys.readouterr().err
    assert "Decoding:  50%|" in shown
    assert "2/4" in shown
    assert capsys.readouterr().err.endswith("\r")
    for is_terminal in (True, False):  # a short loop
        with Bar(3, "Decoding", is_terminal=lambda is_one=is_terminal: is_one) as bar:  # type: ignore[misc]
            bar.update(3)
    assert not capsys.readouterr().err
    assert not caplog.messages


def test_words_without_an_option_are_told_from_equal_values_of_options() -> None:
    parser = Parser(prog="make.py")
    for name in ("input", "output"):
        parser.add_argument(f"--{name}", required=True).by_place = True  # type: ignore[attr-defined]
    parser.add_argument("--target")
    args = parser.parse_args(["other", "--target", "other", "--", "-made"])
    assert (args.input, args.target, args.output) == ("other", "other", "-made")
    args = parser.parse_args(["--input", "x", "--target", "y", "y"])
    assert (args.input, args.target, args.output) == ("x", "y", "y")


def test_what_libraries_say_of_themselves_is_not_shown() -> None:
    lines = (
        "import logging, warnings",
        "from modules.command import start_logging",
        "start_logging()",
        "logging.getLogger('torch._subclasses.fake_tensor').info('FakeTensor cache stats:')",
        "warnings.warn('Image size (9 pixels) exceeds limit of 8 pixels, could be a bomb')",
    )
    assert run_program(sys.executable, "-c", "\n".join(lines), folder=ROOT).stderr == ""


@pytest.mark.parametrize(
    ("word", "typed"),
    [
        ("target_index=1,control_index=0;2", '"target_index=1,control_index=0;2"'),
        ("Bilder von J\u00f6rg & Co\\a.png", '"Bilder von J\u00f6rg & Co\\a.png"'),
        ("a folder\\", '"a folder\\\\"'),
        ('a "cat" of $5', "'a \"cat\" of $5'"),
        ("it's", '"it\'s"'),
        ("", '""'),
    ],
)
def test_a_command_on_windows_is_quoted_for_both_of_its_shells(word: str, typed: str) -> None:
    assert command.quote_for_windows(["python", "x.py", word]) == f"python x.py {typed}"
