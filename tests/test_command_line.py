"""Every option of the frozen manifests stands in the scripts with its type, default and choices."""

import argparse
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from modules import parser as parsing
from modules.errors import OptionError
from modules.parser import reject_unsupported
from tests.test_imports import SCRIPTS, TOOLS

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = sorted((ROOT / "tests" / "data" / "cli").glob("*.json"))
# ours may offer more, never less
WIDER_CHOICES = {
    *("--attn_mode", "--dynamo_backend", "--log_with", "--loss_type", "--sample_solver"),
    *("--save_precision", "--target", "--task", "--teacher", "--timestep_sampling", "--ltx_version"),
    "--ic_lora_strategy",  # an older spelling too
    "--max_token_length",
}
WIDER_TYPES = {
    "--blocks_to_swap",
    "--max_timestep",
    "--min_timestep",
    "--seed",
}  # a function of the text, which takes all that the type does
# ours takes several words, or none at all
WIDER_COUNTS = {"--control_image_path", "--lora_weight", "--lora_multiplier", "--latent_path"}
# at the size that the others have the model makes no usable picture
OUR_DEFAULTS = {
    # safetensors: pickles can hold code
    *((f"{script}train_textual_inversion.py", "--save_model_as") for script in ("", "sdxl_")),
    ("flux_train_control_net.py", "--save_model_as"),
    *((f"{name}_generate_image.py", "--image_size") for name in ("qwen_image", "zimage")),
    # the best device that there is; strengths that are not given are 1
    *(
        (f"{script}_generate_image.py", f"--{name}")
        for script in ("krea2", "qwen_image_21")
        for name in ("device", "lora_multiplier")
    ),
    # without a size, the VAE runs as loaded: --vae_tiling divides its work
    *(
        (f"hv_1_5_{script}.py", "--vae_sample_size")
        for script in ("cache_latents", "generate_video", "train_network")
    ),
    ("hv_1_5_train_network.py", "--task"),  # the name of the transformer says which
    ("hv_1_5_generate_video.py", "--lora_multiplier"),  # strengths that are not given are 1
    ("ideogram4_generate_image.py", "--lora_multiplier"),
    # the first level of the published schedule
    *((f"ideogram4_{script}.py", "--initial_sigma") for script in ("generate_image", "train_network")),
    ("ideogram4_generate_image.py", "--dtype"),  # the file's
    # without effect there too
    *(("ideogram4_train_network.py", f"--ideogram4_timestep_{name}") for name in ("mu", "std")),
    # those of the task and the release
    *(("hv_1_5_generate_video.py", f"--{name}") for name in ("video_size", "flow_shift")),
    # a switch is off by itself
    *(("ltx2_generate_video.py", f"--{no}inpaint_invert") for no in ("", "no-")),
    ("ltx2_generate_video.py", "--inpaint_threshold"),
    # the dtype of the file, torch's own attention, and what the known trainer never leaves out
    *(
        (f"qwen_image_21_{script}.py", f"--{name}")
        for script in ("cache_text_encoder_outputs", "generate_image", "train_network")
        for name in ("attn_mode", "dtype", "dit_dtype", "vae_dtype", "text_encoder_dtype", "split_attn")
    ),
    # of ours, they say which they are
    ("qwen_image_21_train_network.py", "--network_module"),
    ("ltx2_train_network.py", "--sample_num_frames"),  # 8n + 1, as it is made
    # ours says which it is; the dtypes of the files
    *(("minimax_h3_train_network.py", f"--{name}") for name in ("network_module", "vae_dtype", "dit_dtype")),
    # follow --model_version, which leaves no choice there
    ("flux_2_generate_image.py", "--infer_steps"),
    ("flux_2_generate_image.py", "--guidance_scale"),
    # the file says its release; a reference is as long as its clip, and its factors are those of the LoRA
    *(
        (f"ltx2_{script}.py", f"--{name}")
        for script in ("cache_latents", "cache_text_encoder_outputs", "generate_video", "train_network")
        for name in ("ltx_version", "reference_frames")
    ),
    ("ltx2_generate_video.py", "--reference_downscale"),
    ("minimax_h3_cache_latents.py", "--vae_dtype"),  # encoding is in float32 alone
    (
        "minimax_h3_cache_text_encoder_outputs.py",
        "--text_encoder_dtype",
    ),  # bfloat16, unless others are float32
    ("minimax_h3_generate_video.py", "--lora_multiplier"),  # strengths that are not given are 1
    # under other names, to be given, or those of the release
    *(
        ("ltx2_train_network.py", f"--{name}")
        for name in ("loss_type", "network_module", "output_dir", "ema_decay", "rescale_scale")
    ),
    *(
        ("ltx2_generate_video.py", f"--{name}")
        for name in ("lora_multiplier", "output_dir", "output_name", "discrete_flow_shift")
    ),
}
# what one record reads for pictures and videos; the other spelling is an option of LTX-2
OTHER_DESTS = {"--image_size": "video_size", "--from_file": "from_file"}
KREA, H3 = "krea2_generate_image.py", "minimax_h3_generate_video.py"
H3_LATENTS = "minimax_h3_cache_latents.py"
H3_TEXTS = "minimax_h3_cache_text_encoder_outputs.py"
SPELLINGS = {
    ("ltx2_generate_video.py", "--output_dir"): "save_path",
    ("ltx2_generate_video.py", "--fp8_base"): "fp8",
    **{(H3, "--video_vae"): "vae", (H3, "--output_fps"): "fps", (H3, "--h3_shift_video"): "flow_shift"},
    **{(H3, "--first_frame"): "image_path", (H3, "--last_frame"): "end_image_path"},
    (H3_LATENTS, "--video_vae"): "vae",
    (H3_TEXTS, "--tokenizer"): "text_encoder_tokenizer",
    **{
        ("minimax_h3_train_network.py", f"--{name}"): dest
        for name, dest in (
            ("video_vae", "vae"),
            ("tokenizer", "text_encoder_tokenizer"),
            ("h3_audio_loss_weight", "audio_loss_weight"),
            ("int8_convrot_base", "h3_convrot_int8"),
        )
    },
    **{(KREA, "--steps"): "infer_steps", (KREA, "--num-images"): "num_videos"},
}
PLACED = {(KREA, "prompt"): "--prompt"}  # what stands without a flag, and with ours
TYPES: dict[str, Any] = {"str": (str, None), "int": (int,), "float": (float,), "path": (Path, None)}


class _ParserFound(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(script: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser a script builds, caught at the moment it would parse."""

    def caught(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise _ParserFound(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", caught)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(_ParserFound) as found:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return found.value.parser


# what is a switch in another trainer, and takes a number here in every family
OF_ANOTHER_KIND = {("ltx2_train_network.py", "--tread")}
of_each_manifest = pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)


@of_each_manifest
def test_every_known_option_is_there_and_in_the_help(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = json.loads(manifest.read_text(encoding="utf-8"))
    parser = parser_of(description["script"], monkeypatch)
    actions, text = parser._option_string_actions, parser.format_help()
    for option in description["options"]:
        for word in option["flags"]:
            place = description["script"], word
            flag = PLACED.get(place, word)
            assert flag in actions, f"{flag} is missing"
            assert flag in text, f"{flag} is not in the help"
            if place in OF_ANOTHER_KIND:
                continue
            more = {"default": actions[flag].default} if place in OUR_DEFAULTS else {}
            more |= {"dest": SPELLINGS[place]} if place in SPELLINGS else {}
            if place in PLACED:
                assert getattr(actions[flag], "by_place", False)
                more |= {"nargs": None}
            _compare(flag, option | more, actions[flag])


def _compare(flag: str, option: dict[str, Any], action: argparse.Action) -> None:
    assert action.dest == OTHER_DESTS.get(flag, option["dest"])
    nargs = "*" if flag in WIDER_COUNTS and action.nargs == "*" else option["nargs"]
    assert action.nargs == nargs or (nargs is None and action.nargs == 0)
    if flag != "--mixed_precision":  # unset means the launcher's setting, which is "no" without one
        default = list(action.default) if isinstance(action.default, tuple) else action.default
        expected = option["default"]
        if isinstance(default, list) and isinstance(expected, str):  # the manifest has the only value alone
            expected = [expected]
        assert default == expected, f"{flag}: default {default!r}"
    if option["choices"] and not hasattr(action, "rejection"):  # what is refused takes any value
        refused = getattr(action, "refused", {})  # by name, with the reason
        ours, known = (
            set(action.choices or ()),
            set(option["choices"]) - {None, *refused},
        )  # None is not typed
        assert ours >= known, flag
        assert flag in WIDER_CHOICES or ours == known, flag
    if option["action"] == "store_true":
        assert isinstance(action, argparse._StoreTrueAction), flag
    elif flag in WIDER_TYPES:
        read = action.type or str  # argparse leaves a text as it is
        assert callable(read)
        assert str(read("7")) == str(TYPES[option["type"]][0](7))  # a seed may be any text
    elif option["type"] in TYPES:
        assert action.type in TYPES[option["type"]], flag


@of_each_manifest
def test_what_is_not_supported_is_refused_by_name_and_with_a_reason(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = parser_of(json.loads(manifest.read_text(encoding="utf-8"))["script"], monkeypatch)
    defaults = {action.dest: action.default for action in parser._actions}
    for action in parser._actions:
        if not hasattr(action, "rejection") or not action.rejection.reason:
            continue
        used = argparse.Namespace(**{**defaults, action.dest: "something"})
        with pytest.raises(OptionError, match=rf"^{action.option_strings[0]} is refused: (--)?\w+"):
            reject_unsupported(parser, used)
    reject_unsupported(parser, argparse.Namespace(**defaults))


def test_the_help_says_each_reason_once_with_its_options_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = parser_of("ltx2_train_network.py", monkeypatch).format_help()

    assert text.count("other formats are not built:\n") == 1
    assert "not built:\n      --fp8_keep_blocks, --fp8_w8a8, --w8a8_mode" in text
    assert len(text.splitlines()) < 1220


COMMANDS = re.compile(r"python (\w+\.py)((?:\\\n|[^\n`])*)")  # with lines that go on


def test_the_short_help_is_a_screen_with_what_the_first_pages_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/first_lora.md")]
    used = {"wan_train_network.py": {"--sample_at_first", "--sample_now", "--validation_split"}}
    for script, words in COMMANDS.findall("\n".join(pages)):
        used.setdefault(script, set()).update(re.findall(r"--\w\w+", words))
    assert "--network_module" in used["wan_train_network.py"]
    for script in used.keys() & {*SCRIPTS} - {"reelsmith.py"}:
        parser = parser_of(script, monkeypatch)
        text = parser.format_short_help()
        missing = {flag for flag in used[script] if not re.search(rf"{flag}\b", text)}
        assert missing <= {"--help", "--guidance_scale"}, script
        if text != parser.format_help():  # of few options
            assert len(text.splitlines()) <= 74, script
            assert max(map(len, text.splitlines()[3:])) <= 80
            assert " ...\n" not in text
    text = " ".join(parser_of("ltx2_train_network.py", monkeypatch).format_short_help().split())
    for sentence in (
        "keep the linear layers of the model's blocks in fp8: half the memory of bf16 --fp8_scaled",
        "--network_dim N rank of the network (default: 4)",
        "--max_train_steps N optimizer steps in total (default: 1600)",
    ):
        assert sentence in text


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_every_option_has_a_help_text(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(script, monkeypatch)

    without = [action.option_strings for action in parser._actions if not (action.help or "").strip()]

    assert not without
    for action in parser._actions:  # Python 3.14 does so with every option that is added: a bare % fails
        parser._get_formatter()._expand_help(action)


def test_help_shows_defaults_and_colours_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of("wan_generate_video.py", monkeypatch)

    parser.print_help()
    plain = capsys.readouterr().out
    monkeypatch.setattr(parsing, "wants_color", lambda _: True)
    parser.print_help()
    colored = capsys.readouterr().out

    assert "(default: h264)" in " ".join(plain.split())
    assert "None)" not in plain
    assert "\x1b" not in plain
    assert "\x1b[36m--codec\x1b[0m" in colored
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain


def test_an_abbreviated_option_is_told(caplog: pytest.LogCaptureFixture) -> None:
    parser = parsing.Parser(prog="x")
    parser.add_argument("--extend_prefix_frames", type=int)
    parser.add_argument("--other", default="")

    arguments = parser.parse_args(["--extend_prefix_frame", "8"])

    assert arguments.extend_prefix_frames == 8
    assert caplog.messages == ["--extend_prefix_frame is taken as --extend_prefix_frames. Write it in full"]
    caplog.clear()
    parser.parse_args(["--extend_prefix_frames=8", "--other", "x"])
    assert not caplog.messages
