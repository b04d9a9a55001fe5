"""Texts and files are read and written safely: encodings, limits, one name replaced by another."""

import io
import os
import random
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.writing import save_tensors
from modules.atomic_write import (
    atomic_folder,
    atomic_path,
    claim_name,
    make_folder,
    recover_folder,
    remove_leftovers,
    write_bytes,
    write_text,
)
from modules.errors import OptionError, OutputError
from modules.limits import MAX_DEPTH
from modules.option_values import read_literals
from modules.output_files import check_output_file, check_output_name, reject_replacing
from modules.script_options import parse_options
from modules.text_encodings import guess_encoding, guess_encodings
from modules.text_files import (
    bad_character,
    parse_json,
    parse_toml,
    read_lines,
    read_tensor_header,
    read_text,
    real_path,
    require_regular_file,
)
from networks.resizing import ResizeOptions
from tests.commands import ROOT


def test_a_text_is_read_without_its_mark_and_with_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa cät\r\nb\rc\n".encode())

    assert read_text(tmp_path / "a.txt") == "a cät\nb\nc\n"
    assert list(read_lines(tmp_path / "a.txt")) == ["a cät", "b", "c"]


def test_texts_and_their_lines_may_be_as_long_as_allowed_and_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 100 + "\n" + "y" * 100)

    assert len(read_text(path, 201)) == 201
    with pytest.raises(OSError, match="larger than"):
        read_text(path, 200)
    assert [len(line) for line in read_lines(path, 100)] == [100, 100]
    with pytest.raises(OSError, match="line 1 has more than 99 characters"):
        list(read_lines(path, 99))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_only_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    reasons = {"pipe": "named pipe", "zero": "device", ".": "Is a directory", "a\0b": "no file name"}

    assert read_text(tmp_path / "link") == "text"
    for name, reason in {**reasons, "dangling": "No such file"}.items():
        for read in (read_text, lambda path: list(read_lines(path)), require_regular_file):
            with pytest.raises(OSError, match=reason):
                read(tmp_path / name)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 200_000])
def test_what_is_nested_too_deeply_is_an_error_of_its_own(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for parse, text in (
        (parse_json, nested),
        (parse_json, '{"a":' * depth + "1" + "}" * depth),
        (parse_toml, f"a = {nested}"),
        (parse_toml, ".".join(["a"] * (depth + 1)) + " = 1"),
        (parse_toml, "[" + " . ".join(['"a"'] * (depth + 1)) + "]"),
    ):
        with pytest.raises(ValueError, match="nested more than 64 levels deep"):
            parse(text)


def test_what_is_nested_as_deeply_as_allowed_or_only_long_is_read() -> None:
    nested = "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)
    assert parse_json(f"[{nested}]") != []
    assert parse_toml(f"a = {nested}") != {}
    assert parse_toml('a = "' + "x. " * 200 + '\\"' * 100_000 + "x" * 1_000_000 + '"').keys() == {"a"}


def test_characters_that_no_text_can_hold_are_told() -> None:
    assert bad_character("a cät 🐈\u200d\n\t") is None
    assert "NUL" in str(bad_character("a\0b"))
    assert "ud800" in str(bad_character("a\ud800b"))


CAPTIONS = {
    "cp1252": "ein roter Käfer fährt über die Straße",
    "cp1250": "dziewczyna w żółtej sukience idzie przez łąkę",
    "cp1251": "девушка в красном платье идёт по улице",
    "koi8_r": "девушка в красном платье идёт по улице",
    "cp1253": "ένα κορίτσι με κόκκινο φόρεμα περπατά",
    "cp932": "赤いドレスを着た女性が街を歩いている",
    "euc_jp": "赤いドレスを着た女性が街を歩いている",
    "gb18030": "一个穿红裙子的女孩在街上走",
    "big5": "一個穿紅裙子的女孩在街上走",
    "cp949": "빨간 드레스를 입은 여자가 거리를 걷고 있다",
    "utf-16": "a red car",
    "utf-16-le": "a red car",
    "utf-16-be": "a red car",
    "utf-32": "a red car",
}


@pytest.mark.parametrize("encoding", CAPTIONS)
def test_the_encoding_of_a_caption_is_found(encoding: str) -> None:
    guess = guess_encoding(CAPTIONS[encoding].encode(encoding))

    assert guess is not None
    assert (guess.text, guess.is_sure) == (CAPTIONS[encoding], True)


def test_captions_of_one_folder_are_judged_together() -> None:
    texts = ["naïve", "un café à Paris, l’été", "des élèves français très fatigués", "ça va"]

    found = guess_encodings([text.encode("cp1252") for text in texts])

    assert [(one.text, one.is_sure) for one in found if one is not None] == [(text, True) for text in texts]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("naïve".encode("cp1252"), "Windows-1252 (Western European)"),
        ("schöne Grüße überall".encode() + b"\xc3", "damaged UTF-8"),
    ],
)
def test_what_may_be_of_two_encodings_or_is_damaged_is_not_sure(data: bytes, name: str) -> None:
    guess = guess_encoding(data)

    assert guess is not None
    assert (guess.name, guess.is_sure) == (name, False)


def test_a_caption_of_another_encoding_than_the_others_is_judged_alone() -> None:
    names = ("cp1251", "cp1251", "gb18030", "utf-16")

    found = guess_encodings([CAPTIONS[name].encode(name) for name in names])

    assert [one and one.text for one in found] == [CAPTIONS[name] for name in names]


@pytest.mark.parametrize("size", [10, 100, 3000])
def test_random_bytes_are_no_sure_text(size: int) -> None:
    dice = random.Random(size)

    guesses = [guess_encoding(dice.randbytes(size)) for _ in range(30)]

    assert not any(guess is not None and guess.is_sure for guess in guesses)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "ä.txt"
    write_text(path, "text")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()

    assert path.read_text(encoding="utf-8") == "text"
    assert _names(tmp_path / "a b") == ["ä.txt"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    # the young one may still be written
    old, young = tmp_path / ".a.bin.1234abcd.tmp", tmp_path / ".b.bin.1234abcd.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))

    write_bytes(tmp_path / "a.bin", b"new")

    assert _names(tmp_path) == [young.name, "a.bin"]


def test_tensors_come_back_and_others_may_read_them(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": torch.arange(6).view(2, 3).T}, {"key": "value"})

    assert torch.equal(load_file(path)["x"], torch.arange(6).view(2, 3).T)
    if os.name != "nt":
        (tmp_path / "plain").touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_file_that_does_not_fit_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="MB free"), atomic_path(tmp_path / "big", size_bytes=1 << 60):
        pass

    assert _names(tmp_path) == []


def test_a_name_is_claimed_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "video"
    with claim_name(path) as first, claim_name(path) as second, claim_name(tmp_path / "other") as other:
        assert (first, second, other) == (True, False, True)
        assert not path.exists()
    with claim_name(path) as again:
        assert again
        (claim,) = tmp_path.iterdir()
        with atomic_folder(path):  # sweeps what it finds of its own name
            pass
        path.rmdir()
        assert claim.exists()
        os.utime(claim, (0, 0))
        remove_leftovers(tmp_path)  # of a killed run
        assert not claim.exists()
    nowhere = claim_name(tmp_path / "no folder" / "video")
    with pytest.raises(OutputError, match="video cannot be written"), nowhere:
        pass


@pytest.mark.skipif(os.name == "nt", reason="asking whether a process lives would end it there")
def test_the_claim_of_a_killed_process_goes_with_the_next_file_and_that_of_a_living_one_stays(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys; from pathlib import Path; from modules.atomic_write import claim_name\n"
        "with claim_name(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "20261127_1"], cwd=ROOT)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()

    with claim_name(tmp_path / "20261127_2") as is_ours:
        assert is_ours
        write_bytes(tmp_path / "20261127_2.png", b"picture")
        assert not left.exists()
        assert sorted(path.name for path in tmp_path.iterdir())[0] == ".20261127_2.claim.00000000.tmp"
    assert _names(tmp_path) == ["20261127_2.png"]


def test_a_folder_appears_whole_and_replaces_the_old_one_unless_writing_fails(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "state") as temporary:
            (temporary / "a").write_text(content)
            assert (tmp_path / "state").exists() == (content == "second")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "state"):
        raise RuntimeError

    assert (tmp_path / "state" / "a").read_text() == "second"
    assert _names(tmp_path) == ["state"]


def test_a_kill_between_the_renames_of_a_folder_is_undone_and_what_others_build_is_left_alone(
    tmp_path: Path,
) -> None:
    for name in (".state.old", ".state.1234abcd.tmp", ".other-state.1234abcd.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".state.safetensors.1234abcd.tmp").touch()

    write_bytes(tmp_path / "a.bin", b"new")
    recover_folder(tmp_path / "state")

    others = [".other-state.1234abcd.tmp", ".state.safetensors.1234abcd.tmp"]
    assert _names(tmp_path) == [*others, "a.bin", "state"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write is needed")
def test_a_folder_in_which_nothing_can_be_written_is_found_out_before_the_work() -> None:
    with pytest.raises(OutputError, match="--save_path /proc/self: nothing can be written there: .*Choose"):
        make_folder(Path("/proc/self"), "--save_path")


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", " . ", "...", "a/b", "/", "../x", "a\\b", "x" * 161, "\u00fc" * 81),
        *("a\nb", "a\tb", "\x1b[31mx", "x\u202ey", "x.safetensors", "x.Safetensors"),
    ],
)
def test_a_name_that_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"^--output_name '.*': .*\. Pass a name") as refused:
        check_output_name("--output_name", name)

    assert len(str(refused.value)) < 250
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "name",
    ["x", "it's \u00fc", ".hidden", "a.b", "v1.0", "console", "com", "lpt10", "my con", "x" * 160, "\u732b"],
)
def test_other_names_are_taken(name: str) -> None:
    check_output_name("--output_name", name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CON", "on Windows CON is a device, with any ending"),
        ("aux.txt", "on Windows aux is a device, with any ending"),
        ("nul .x", "on Windows nul is a device"),
        ("com\u00b9", "on Windows com\u00b9 is a device"),
        ('a"b', 'names on Windows cannot have the character "'),
        ("a:b", "names on Windows cannot have the character :"),
        ("what?", "cannot have the character \\?"),
        ("v1.", "it ends in a dot, which Windows removes"),
        ("v1 ", "it ends in a space, which Windows removes"),
    ],
)
def test_what_windows_cannot_have_is_refused_everywhere_but_goes_on(name: str, reason: str) -> None:
    with pytest.raises(OptionError, match=rf"^--output_name .*: .*{reason}.*\. Pass a name of letters"):
        check_output_name("--output_name", name)
    check_output_name("--output_name", name, is_new=False)


@pytest.mark.parametrize("sign", ["x", "(", "-", "[", "9", "1+", "{1:"])
def test_an_argument_of_any_length_is_text_or_one_short_message(sign: str) -> None:
    with pytest.raises(OptionError, match="10,000 characters are allowed at most") as refused:
        read_literals("--optimizer_args", ["a=" + sign * 100_000])
    assert len(str(refused.value)) < 250

    assert read_literals("--optimizer_args", ["a=" + (sign * 9_000)[:9_000]]).keys() == {"a"}


def test_a_file_is_not_replaced_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.safetensors"
    check_output_file("--output", file)
    assert not caplog.text
    file.touch()
    check_output_file("--output", file)
    assert f"--output {file} already exists: it will be replaced" in caplog.text


def test_a_file_that_may_not_be_replaced_is_not_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "x.safetensors"
    file.touch()
    words = ["--model", str(file), "--save_to", str(file), "--new_rank", "2"]
    with pytest.raises(OptionError, match="is one of the files to read"):
        parse_options("", words, ResizeOptions)
    assert not caplog.text


def test_a_file_that_is_read_is_not_replaced_by_any_way_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    original = folder / "x.st"
    folder.mkdir()
    original.touch()
    (tmp_path / "link").symlink_to(original)
    os.link(original, tmp_path / "hard link")
    (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
    names = ("x.st", "../folder/x.st", "../link", "../hard link", "../linked/x.st")

    for name in names:
        with pytest.raises(OptionError, match="would be lost. Pass a new name"):
            reject_replacing("--output", folder / name, [original])


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_in_a_circle_lead_nowhere_and_raise_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert real_path(tmp_path / "loop") == Path(os.path.realpath(tmp_path)) / "loop"


def test_a_path_that_no_file_can_have_stays(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800"):
        assert real_path(tmp_path / name) == tmp_path / name
    rooms = [
        path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "pocket")
    ]
    wild = [
        path.name
        for path in (path for room in rooms for path in room.rglob("*.py"))
        if re.search(
            r"^(?!.*(__file__|sys\.path\[:\])).*\.resolve\(\)", path.read_text(encoding="utf-8"), re.M
        )
    ]
    assert wild == []


def test_a_header_that_is_no_table_is_not_read() -> None:
    pieces: list[int] = []
    content = io.BytesIO((1 << 26).to_bytes(8, "little") + bytes(100))

    def read(size: int) -> bytes:
        pieces.append(size)
        return content.read(size)

    with pytest.raises(ValueError, match="not a table of tensors"):
        read_tensor_header(read, 1 << 27)
    assert sum(pieces) <= 16


def test_pairs_in_one_word_are_told_and_lists_with_blanks_are_not_pairs() -> None:
    for words in ("a=1 b=2", "a=1 betas=(0.9, 0.95)", "a=1,b=2", "a=1; b = 2"):
        with pytest.raises(OptionError, match="as a word of its own, without a separator: a=1 b"):
            read_literals("--optimizer_args", [words])
    for mark, name in ((",", "comma"), (" ; ", "semicolon")):
        with pytest.raises(OptionError, match=f"a {name} follows the value.*only: a=0.1"):
            read_literals("--optimizer_args", [f"a=0.1{mark}"])
    assert read_literals("--network_args", ["rates=.*a=1,.*b=2"]) == {"rates": ".*a=1,.*b=2"}
    assert read_literals("--optimizer_args", ["betas=(0.9, 0.95)", "x=['a b=2']"]) == {
        "betas": (0.9, 0.95),
        "x": ["a b=2"],
    }


def test_an_empty_file_of_tensors_is_called_empty() -> None:
    with pytest.raises(ValueError, match="it is empty"):
        read_tensor_header(io.BytesIO().read, 0)
