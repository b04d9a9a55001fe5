"""Weights, alternatives and wildcards in a prompt are read from its text."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import wan_generate_video
from blissful_tuner.options import PLAIN_PROMPTS, PromptOptions
from blissful_tuner.prompt_rewrite import PromptRewriter
from blissful_tuner.prompt_syntax import expand_texts, parse_weights, select_alternatives, unescape
from modules.control_codes import extract_caption
from modules.errors import CheckpointError, OptionError
from tests.golden_cases import read_case
from tests.tiny.published import write_chat_model
from tests.tiny.wan import write_tiny_wan

GOLDEN, _ = read_case("prompt_weights")
# that tool cut a prompt at "|", and took the first "(" of the text with the last ")" before a number
AS_THERE = {"a (red:1.5) car", "no weights", "(two words:1.2) (two words:1.4)", "cost (USD: 1.5)"}


def parts(text: str) -> tuple[str, list[tuple[str, float]]]:
    found, spans = parse_weights(text)
    return found, [(found[start:end], weight) for start, end, weight in spans]


@pytest.mark.parametrize(("text", "there"), [case for case in GOLDEN["cases"] if case[0] in AS_THERE])
def test_texts_and_weights_are_the_measured_ones(text: str, there: list[dict[str, object]]) -> None:
    found, weighted = parts(text)
    assert found == there[0]["prompt"]
    assert dict(weighted) == there[0]["weights"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(big dog:0.8) and (cat:1.25) | b", ("big dog and cat | b", [("big dog", 0.8), ("cat", 1.25)])),
        ("(two:1.2) (two:1.4)", ("two two", [("two", 1.2), ("two", 1.4)])),  # each its own
        ("(up:+1.5)(down:-0.5)(none:0)", ("updownnone", [("up", 1.5), ("down", -0.5), ("none", 0.0)])),
        ("(c:1.) (d:.5)", ("c d", [("d", 0.5)])),  # 1 is not a weight
        ("[red] car", ("[red] car", [])),
        ("(a:b) (c:1.5x) (d: 2) (:2) () ( )", ("(a:b) (c:1.5x) (d: 2) (:2) () ( )", [])),
        ("((inner:1.2):1.5)", ("(inner:1.5)", [("inner", 1.2)])),
        ("open ( and ) close) (", ("open  and  close) (", [("and", 1.1)])),
        (r"\(plain\) (a \(b\):2)", ("(plain) a (b)", [("a (b)", 2.0)])),
        ("(ratio 4:3:1.2)", ("ratio 4:3", [("ratio 4:3", 1.2)])),
        ("a ( red :2) car", ("a  red  car", [("red", 2.0)])),
        ("(猫:1.3)が歩く", ("猫が歩く", [("猫", 1.3)])),
        ("", ("", [])),
    ],
)
def test_what_has_a_weight(text: str, expected: tuple[str, list[tuple[str, float]]]) -> None:
    assert parts(text) == expected


@pytest.mark.parametrize("weight", ["101", "-5000", "9" * 400])
def test_a_weight_beyond_all_sense_is_refused(weight: str) -> None:
    with pytest.raises(OptionError, match=r"--prompt_weighting: .* has a weight beyond 100;"):
        parse_weights(f"a (red:{weight}) car")


def first(text: str) -> str:
    return unescape(select_alternatives(text, lambda weights: 0))


def last(text: str) -> str:
    return unescape(select_alternatives(text, lambda weights: len(weights) - 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|blue} car", ("a red car", "a blue car")),
        ("a {red |} car", ("a red car", "a  car")),
        ("{a|{b|c}} {d|e}", ("a d", "c e")),
        ("{{a|b} {c|d}|e}", ("a c", "e")),
        ("{2::a|0.5:: b |c}", ("a", "c")),
        ("{one} {} | } { {x|y", ("{one} {} | } { {x|y",) * 2),  # plain text
        ("{ {a|b}", ("{ a", "{ b")),
        ("{in {a|b}}", ("{in a}", "{in b}")),
        (r"\{a|b\} {a\|b|c}", ("{a|b} a|b", "{a|b} c")),
        ("{1:a|x::b}", ("1:a", "x::b")),  # no weights
    ],
)
def test_what_is_chosen_from(text: str, expected: tuple[str, str]) -> None:
    assert (first(text), last(text)) == expected


def test_weights_are_handed_on_and_nothing_is_drawn_in_what_is_not_chosen() -> None:
    asked = []

    def choose(weights: list[float]) -> int:
        asked.append(weights)
        return 0

    select_alternatives("{2::a|.5::{b|c}|d} {e|f}", choose)
    assert asked == [[2.0, 0.5, 1.0], [1.0, 1.0]]


CARDS, _ = read_case("wildcards")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The recorded files in a folder `cards`."""
    for name, content in CARDS["files"].items():
        write(tmp_path / "cards", name, content)
    return tmp_path / "cards"


def write(folder: Path, name: str, content: str) -> None:
    path = folder / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def options(folder: Path | None, alternatives: bool = False) -> PromptOptions:
    return replace(PLAIN_PROMPTS, prompt_wildcards=folder, prompt_alternatives=alternatives)


def expand(folder: Path | None, text: str, seed: int = 1, alternatives: bool = False) -> str:
    found = expand_texts({"prompt": text}, options(folder, alternatives), seed)["prompt"]
    assert found is not None
    return found


def possible(text: str) -> set[str]:
    """Every result that a text can have with the recorded files."""
    lines = {
        "color": ["red", "blue", "green"],
        "animal": ["cat", "dog", "tiny fox", "huge fox"],
        "size": ["tiny", "huge"],
        "sub/tree": ["oak", "pine"],
        "badw": ["x:heavy"],  # no number, so it is text
    }
    parts = re.split(r"__(\S+?)__", text)
    choices = [[part] if index % 2 == 0 else lines[part] for index, part in enumerate(parts)]
    return {"".join(picked) for picked in itertools.product(*choices)}


@pytest.mark.parametrize("case", CARDS["cases"], ids=range(len(CARDS["cases"])))
def test_recorded_prompts_have_possible_results_or_are_refused(folder: Path, case: dict[str, object]) -> None:
    """Not the recorded ones: there one draw served all occurrences, and their order was not defined."""
    text, there = str(case["prompt"]), case["result"]
    if isinstance(there, dict) and text != "__badw__":
        with pytest.raises(OptionError, match="--prompt"):
            expand(folder, text)
    else:
        found = [expand(folder, text, seed) for seed in range(40)]
        assert set(found) <= possible(text)
        assert len(set(found)) == 1 or len(set(found)) > len(possible(text)) / 3
        assert len(possible(text)) == 1 or len(set(found)) > 1


def test_what_a_seed_draws_is_settled_for_good(folder: Path) -> None:
    """Prompts in files that were made stay what they are: a change here changes what a seed means."""
    assert expand(folder, "__color__ __animal__ __color__ __size__", 42) == "blue cat red tiny"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("16:9 screen", "16:9 screen"),
        ('"ratio 16:9"', "ratio 16:9"),
        ('"ratio 16:9":2', "ratio 16:9"),
        ("a: b : 3", "a: b"),
        ("(red:1.4):2", "(red:1.4)"),
        ('say "hi"', 'say "hi"'),
    ],
)
def test_a_weight_stands_behind_the_last_colon(folder: Path, line: str, text: str) -> None:
    write(folder, "one", f"# what follows\n\n  {line}  \n")
    assert expand(folder, "__one__") == text


def test_a_wildcard_file_may_have_many_lines_and_large_weights(folder: Path) -> None:
    """The limit of weights in prompts, 100, is not one of the weights to draw by."""
    write(folder, "many", "\n".join(["word"] * 1000))
    write(folder, "heavy", "rare:1\ncommon:1000000")
    assert expand(folder, "__many__") == "word"
    assert expand(folder, "__heavy__") == "common"


def test_wildcards_and_alternatives_may_hold_one_another(folder: Path) -> None:
    write(folder, "pair", "{left|left} __one__")
    write(folder, "one", "hand")
    assert expand(folder, "{__pair__|__pair__}!", alternatives=True) == "left hand!"
    assert expand(folder, "__pair__") == "{left|left} hand"  # braces are text without the switch
    assert expand(None, "{__pair__|__pair__}", alternatives=True) == "__pair__"


@pytest.mark.parametrize(
    "key",
    ["/etc/x", "../x", "sub/../../x", "C:/x", r"sub\tree", "./color", "a\x07b", "~/.."],
)
def test_paths_out_of_the_folder_are_no_wildcards(folder: Path, key: str) -> None:
    (folder.parent / "x.txt").write_text("secret", encoding="utf-8")
    with pytest.raises(OptionError, match="does not name a file in --prompt_wildcards"):
        expand(folder, f"__{key}__")


def test_links_that_leave_the_folder_are_refused(folder: Path) -> None:
    (folder.parent / "x.txt").write_text("secret", encoding="utf-8")
    (folder / "link.txt").symlink_to(folder.parent / "x.txt")
    (folder / "out").symlink_to(folder.parent, target_is_directory=True)
    (folder / "inside.txt").symlink_to(folder / "size.txt")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    for key in ("link", "out/x"):
        with pytest.raises(OptionError, match="is a link that leads out of"):
            expand(folder, f"__{key}__")
    with pytest.raises(OptionError, match="does not exist"):
        expand(folder, "__circle__")
    assert expand(folder, "__inside__") in {"tiny", "huge"}
    (folder.parent / "home").symlink_to(folder, target_is_directory=True)
    assert expand(folder.parent / "home", "__size__") in {"tiny", "huge"}  # the folder itself may be a link


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights that answers with words of its small vocabulary."""
    return write_chat_model(tmp_path_factory.mktemp("chat modél"))


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ('  "A cat\nwalks."  ', "A cat walks."),
        ("<think>It is a\n cat.</think>\n\nA cat.", "A cat."),
        ("<think>Okay, the user wants a cat, and then no end of the", ""),
        ("A cat.<thinking>Was that", "A cat."),
        ("It is a cat, no start of the thought.</think> A cat.", "A cat."),
        ("“A cat.”", "A cat."),
        ('"A" and "B"', 'A" and "B'),
        ("", ""),
        ("x" * 9000, "x" * 4000),
    ],
)
def test_the_answer_is_one_paragraph(answer: str, taken: str) -> None:
    assert extract_caption(answer) == taken


def test_it_is_used_and_recorded(chat_model: Path, tmp_path: Path) -> None:
    """The video is that of the rewritten prompt typed by hand; the file says both texts."""
    files = write_tiny_wan(tmp_path / "models")
    words = [*files.models, "--video_size", "32", "32", "--video_length", "1", "--infer_steps", "1"]
    words += ["--seed", "1", "--output_type", "latent", "--device", "cpu", "--task", "t2v-1.3B"]

    def make(name: str, *more: str) -> tuple[torch.Tensor, dict[str, str]]:
        wan_generate_video.main([*words, "--save_path", str(tmp_path / name), *more])
        (path,) = (tmp_path / name).glob("*_latent.safetensors")
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("latent"), file.metadata()

    rewriting = ["--prompt_rewrite", "master", "--prompt_rewrite_model", str(chat_model)]
    latents, metadata = make("rewritten", "--prompt", "a cat", *rewriting)
    text = metadata["bt_rewritten_prompt"]
    assert text
    assert metadata["bt_prompt"] == "a cat"
    typed, _ = make("typed", "--prompt", text)
    assert torch.equal(latents, typed)
    plain, _ = make("plain", "--prompt", "a cat")
    assert not torch.equal(latents, plain)


def test_what_is_no_chat_model_is_an_error(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot load it"):
        PromptRewriter(tmp_path, "normal").load(CPU)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((chat_model / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"no chat template|cannot load it"):
        PromptRewriter(tmp_path, "normal").load(CPU)


@pytest.fixture
def own_copy(chat_model: Path, tmp_path: Path) -> Path:
    """A copy of the chat model to damage."""
    return Path(shutil.copytree(chat_model, tmp_path / "copy"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_folder_cannot_name_code_to_fetch(key: str, own_copy: Path) -> None:
    """transformers takes attention of that form from the hub and runs it, if the package kernels is there."""
    config = json.loads((own_copy / "config.json").read_text(encoding="utf-8"))
    (own_copy / "config.json").write_text(json.dumps({**config, key: "someone/code"}), encoding="utf-8")
    rewriter = PromptRewriter(own_copy, "normal")
    rewriter.load(CPU)
    model, _ = rewriter._loaded.get()
    assert model.config._attn_implementation == "eager"
