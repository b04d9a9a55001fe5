"""Every command that a script or a page prints runs when it is typed as printed, for every family.

Captions are cached with what the caching of latents prints, the data set is checked with what that prints; a
training without samples, whose options name no encoder, prints how to generate and how to train longer.
"""

import html
import re
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataset.cache.commands import NAME
from tests.faults.messages import succeed_here
from tests.run_pages import read_run_page
from tests.tiny.families import CLIP, FAMILIES, OUTPUT, TWO_LISTS, Command, TinyFamily, family_called
from tests.tiny.families import _wan as wan_of  # a variant that no other test drives
from tests.tiny.project import write_image, write_image_dataset, write_images
from tests.tiny.wan import write_tiny_wan

NEXT = re.compile(r"Next, [^\n]*?(?: \(fill in ([^\n:]*):[^\n]*\))?:\n  (python [^\n]*)")
# options of a training that only samples need
OF_ENCODERS = (
    *("--vae", "--ae", "--ltx2_video_vae", "--ltx2_audio_vae", "--vae_dtype", "--clip", "--image_encoder"),
    *("--t5", "--t5xxl", "--clip_l", "--text_encoder", "--text_encoder1", "--text_encoder2", "--byt5"),
    *("--gemma2", "--gemma_root", "--ltx2_text_encoder_checkpoint", "--text_encoder_dtype", "--one_frame"),
    *("--system_prompt",),
)
NF4 = ["--nf4_base", "--blocks_to_swap", "1"]
INT8 = ["--convrot_int8"]
FP8 = ["--fp8_base", "--fp8_scaled"]
# options of a training -> those that its page prints for generation
FORMS = {"plain": ([], []), "nf4": (NF4, ["--nf4", *NF4[1:]]), "int8": (INT8, INT8), "fp8": (FP8, FP8[1:])}
IMAGES = {"IMAGE_FILE": "start.png", "END_IMAGE_FILE": "end.png"}


@dataclass(frozen=True)
class PrintedCase:
    """What is trained, and what the line that generates has to say."""

    family: TinyFamily
    form: str
    says: tuple[str, ...] = ()  # words in a row
    missing: tuple[str, ...] = ()  # what no cache tells
    is_daily: bool = False
    prepare: Callable[[Path], None] | None = None  # in place of the family's


def one_frame_of_wan(folder: Path) -> None:
    write_tiny_wan(folder / "model", "i2v")
    write_images(folder / "clips", folder / "control")
    write_image_dataset(folder, batch_size=1)


def vace_with_all(folder: Path) -> None:
    family_called("wan vace-1.3B").prepare(folder)
    for name, size in (("masks", 48), ("references", 32)):
        (folder / name).mkdir()
        for index in range(4):
            write_image(folder / name / f"clip {index}.png", size, size)
    with (folder / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write('control_mask_directory = "masks"\nreference_directory = "references"\n')


def control(*names: str) -> tuple[str, ...]:
    return tuple(f"{{folder}}/control/{name}" for name in names)


CONTROLS = control("picture 0_0.png", "picture 0_1.png")
PLACES = "target_index=1,control_index=0+3"
ONE_FRAME = wan_of("i2v-14B", "i2v", with_clip=[*CLIP, "--one_frame"], media=[])
VACE = family_called("wan vace-1.3B")
SAYS = {
    "wan t2v-1.3B-FC": ("--control_path", *control("clip 0.mp4")),
    "wan i2v-14B-FC": ("--control_path", *control("clip 0.mp4")),
    "wan vace-1.3B": ("--src_video", *control("clip 0.mp4")),
    "framepack one frame": (
        *("--one_frame_inference", PLACES, "--control_image_path"),
        *control("picture 0_0.png", "picture 0_1.png"),
    ),
    "chroma": ("--model_type", "chroma", "--apply_t5_attn_mask"),
    "kontext": ("--control_image_path", *control("picture 0.png"), "--no_resize_control"),
    "flux_2": ("--control_image_path", *control("picture 0_0.png", "picture 0_1.png")),
    "qwen_image edit-2511": ("--control_image_path", *control("picture 0.png")),
    "qwen_image_21 edit": ("--control_image_path", *control("picture 0_0.png", "picture 0_1.png")),
    "moss_image edit": ("--control_image_path", *control("picture 0_0.png", "picture 0_1.png")),
    "fibo_2 edit": ("--control_image_path", *control("picture 0_0.png", "picture 0_1.png")),
    "hidream_o1 edit": ("--control_image_path", *control("picture 0_0.png", "picture 0_1.png")),
    "krea2 edit": ("--control_image_path", *control("picture 0.png"), "--kv_cache"),
    "lumina": ("--system_prompt", "Draw."),
    "ltx_2": ("--ltx2_text_encoder_checkpoint", "model/text.safetensors"),
    "ltx_2 with sound": ("--ltx2_mode", "av", "--gemma_root", "model/gemma"),
}
MISSING = {
    **dict.fromkeys(("wan i2v-14B", "wan i2v-14B-FC", "skyreels i2v", "kandinsky i2v"), ("IMAGE_FILE",)),
    **dict.fromkeys(("framepack", "framepack f1", "hunyuan_video_15 i2v"), ("IMAGE_FILE",)),
    "wan flf2v-14B": ("IMAGE_FILE", "END_IMAGE_FILE"),
}
CASES = [
    *(
        PrintedCase(
            family,
            "int8" if family.name in TWO_LISTS else [*FORMS][place % len(FORMS)],  # too short to swap
            SAYS.get(family.name, ()),
            MISSING.get(family.name, ()),
            family.name == "krea2 edit",
        )
        for place, family in enumerate(FAMILIES)
    ),
    PrintedCase(
        ONE_FRAME,
        "plain",
        (
            *("--one_frame_inference", PLACES, "--control_image_path"),
            *CONTROLS,
        ),
        is_daily=True,
        prepare=one_frame_of_wan,
    ),
    PrintedCase(
        VACE,
        "nf4",
        (
            *("--src_video", *control("clip 0.mp4"), "--src_mask", "masks/clip 0.png"),
            *("--src_ref_images", "references/clip 0.png"),
        ),
        prepare=vace_with_all,
    ),
]


def case_name(case: PrintedCase) -> str:
    return f"{case.family.name} {case.form}" + (" all" if case.prepare is not None else "")


MARKED = [
    pytest.param(case, id=case_name(case), marks=() if case.is_daily else pytest.mark.slow) for case in CASES
]


def typed(line: str, folder: Path, more: Command = ()) -> str:
    """Run a printed line in a folder; the script's path is as it was printed."""
    words = shlex.split(line)
    return succeed_here(Path(words[1]).name, *words[2:], *more, folder=folder)


def printed_next(said: str) -> tuple[str, list[str]]:
    """The command that comes next, and the words that it lacks."""
    found = NEXT.search(said)
    assert found is not None, said
    return found[2], found[1].split(" and ") if found[1] else []


def fill_in(line: str, missing: list[str], known: Command) -> str:
    """Replace words by what follows their option in a command, or by a picture."""
    words = shlex.split(line)
    for word in missing:
        place = words.index(word)
        option = words[place - 1]
        if word in IMAGES or option in known:
            words[place] = IMAGES.get(word) or known[known.index(option) + 1]
        else:  # Chroma has no CLIP
            del words[place - 1 : place + 1]
    return shlex.join(words)


def further_options(command: Command, line: str) -> Command:
    """The options of a command that a printed line does not have: settings, which no file tells."""
    further, is_further = list[str](), False
    for word in command[1:]:
        is_further = word not in shlex.split(line) if word.startswith("--") else is_further
        further += [word] if is_further else []
    return further


def without_encoders(train: Command) -> Command:
    kept, is_left_out = list[str](), False
    for word in train:
        is_left_out = word in OF_ENCODERS if word.startswith("--") else is_left_out
        kept += [] if is_left_out else [word]
    return kept


def page_commands(folder: Path) -> dict[str, tuple[str, str]]:
    """The note and the line of each command on the page, by title."""
    page = read_run_page(folder / "output", "lora")
    found = re.findall(r'(?s)<h3>([^<]*)</h3>\s*(?:<p class="note">(.*?)</p>)?\s*<pre>(.*?)</pre>', page)
    plain = [[html.unescape(re.sub("<[^>]*>", "", text)) for text in each] for each in found]
    return {title: (note, line) for title, note, line in plain}


def small(case: PrintedCase) -> Command:
    """Options that make a printed generation short."""
    name = case.family.name
    words = ["--video_size", "32", "32", "--infer_steps", "1"]
    if name.startswith("ltx"):
        return [*words, "--video_length", "9"]
    if name.startswith("framepack"):
        return words if "one frame" in name else [*words, "--video_sections", "1"]
    clips = ("wan", "hunyuan_video", "skyreels", "kandinsky")
    is_clip = name.startswith(clips) and name != "kandinsky image" and case.family is not ONE_FRAME
    return [*words, "--video_length", "5"] if is_clip else words


@pytest.mark.parametrize("case", MARKED)
def test_all_that_is_printed_runs(case: PrintedCase, tmp_path: Path) -> None:
    family, folder = case.family, tmp_path / "a folder \u00fc"
    folder.mkdir()
    (case.prepare or family.prepare)(folder)
    given, expected = FORMS[case.form]

    line, missing = printed_next(succeed_here(*family.cache_latents, folder=folder))
    assert missing
    line = fill_in(line, missing, family.cache_texts)
    check, missing = printed_next(typed(line, folder, further_options(family.cache_texts, line)))
    assert not missing
    said = typed(check, folder)
    assert "not counted" not in said
    again, missing = printed_next(succeed_here(*family.cache_latents, folder=folder))
    assert not missing
    assert "0 written" in typed(again, folder)

    train = [*without_encoders(family.train), *given, *OUTPUT, "--max_train_steps", "1"]
    succeed_here(*train, folder=folder)
    commands = page_commands(folder)
    longer, generate = (
        commands["Train longer, as a new run from the trained file"],
        commands["Generate with it"],
    )

    words = shlex.split(generate[1])
    assert [word for word in case.missing if word in words] == [*case.missing]
    assert generate[0].startswith("Fill in") == bool(case.missing)
    says = [text.format(folder=folder.as_posix()) for text in case.says]
    for wanted in (says, expected):
        assert is_row(wanted, words), words
    typed(fill_in(generate[1], [*case.missing], []), folder, small(case))
    assert any((folder / "output" / "generated").iterdir())
    assert longer[1].split().count("--sdpa") == family.train.count("--sdpa")
    typed(longer[1], folder, ["--overwrite"])


FULL = [
    pytest.param(family, id=family.name, marks=[pytest.mark.slow] * (family.name != "krea2"))
    for family in FAMILIES
    if family.train_full
]


@pytest.mark.parametrize("family", FULL)
def test_what_is_printed_after_a_whole_training_runs(family: TinyFamily, tmp_path: Path) -> None:
    """Generate with the file, and extract a LoRA of the change, with which generation runs too."""
    folder = tmp_path / "a folder \u00fc"
    folder.mkdir()
    family.prepare(folder)
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    models = family.train[1 : family.train.index("--network_module")]
    words = [family.train_full, *models, *OUTPUT, "--learning_rate", "1e-3", "--max_train_steps", "1"]

    said = succeed_here(*words, folder=folder)

    commands = page_commands(folder)
    generate, extract = commands["Generate with it"][1], commands["Extract a LoRA from it"][1]
    assert extract[extract.index(" --model_org") :] in said
    case = PrintedCase(family, "plain")
    typed(fill_in(generate, [*MISSING.get(family.name, ())], []), folder, small(case))
    words = shlex.split(extract)
    lora = succeed_here("networks/extract_lora_from_models.py", *words[2:], folder=folder)
    kept = re.search(r"kept: +(\d+\.\d)%", lora)
    assert kept is not None
    assert float(kept[1]) > 50
    used = [*words[words.index("--save_to") + 1 : words.index("--save_to") + 2]]
    at_strength = ["--lora_weight", *used, "--lora_multiplier", "1"]
    said = succeed_here(*family.generate, *small(case), "--prompt", "a cat", "--save_path", "with lora",
                        *at_strength, folder=folder)  # fmt: skip
    assert "no module" not in said


def is_row(wanted: list[str], words: list[str]) -> bool:
    """Whether words stand in a row among others."""
    count = len(wanted)
    return any(words[start : start + count] == wanted for start in range(len(words) - count + 1))


def test_a_training_with_samples_prints_its_own_options(tmp_path: Path) -> None:
    """The form of the base, and of the text encoder that the samples had."""
    family = family_called("krea2")
    family.prepare(tmp_path)
    (tmp_path / "prompts.txt").write_text(f"{family.sample_line}\n", encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    form = ["--text_encoder_form", "nf4"]
    samples = ["--sample_prompts", "prompts.txt", "--sample_at_first"]

    succeed_here(*family.train, *NF4, *form, *samples, *OUTPUT, "--max_train_steps", "1", folder=tmp_path)

    note, line = page_commands(tmp_path)["Generate with it"]
    words = shlex.split(line)
    assert note == "The first sample again; change the prompt."
    assert is_row(form, words)
    assert is_row(["--nf4", *NF4[1:]], words)
    assert is_row(["--image_size", "32", "32", "--steps", "2"], words)  # as its page calls them
    typed(line, tmp_path)


def test_the_spelling_that_was_typed_is_printed_again(tmp_path: Path) -> None:
    """Of LTX-2.5, whose options have other names in its official code."""
    family = family_called("ltx_2")
    family.prepare(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    train = without_encoders(family.train)

    succeed_here(*train, *OUTPUT, "--max_train_steps", "1", "--save_state_on_train_end", folder=tmp_path)

    commands = page_commands(tmp_path)
    for title in ("Train longer", "This run, as it was started"):
        words = shlex.split(commands[title][1])
        assert is_row(["--ltx2_checkpoint", "model/ltx 2.3.safetensors"], words)
        assert not {"--transformer-path", "--ltx_mode"} & {*words}
    words = shlex.split(commands["Generate with it"][1])
    assert is_row(["--ltx2_video_vae", "model/video vae.safetensors"], words)
    assert "--gemma_root" not in words


@pytest.mark.parametrize(
    "family",
    [ONE_FRAME, pytest.param(family_called("framepack one frame"), marks=pytest.mark.slow)],
    ids=["wan", "framepack"],
)
def test_caches_of_another_program_tell_single_pictures_by_their_tensors(
    family: TinyFamily, tmp_path: Path
) -> None:
    (one_frame_of_wan if family is ONE_FRAME else family.prepare)(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    (tmp_path / "cache" / NAME).unlink()
    train = without_encoders(family.train)

    succeed_here(*train, *OUTPUT, "--max_train_steps", "1", folder=tmp_path)

    note, line = page_commands(tmp_path)["Generate with it"]
    controls = [text.format(folder=tmp_path.as_posix()) for text in CONTROLS]
    assert is_row(["--one_frame_inference", PLACES, "--control_image_path", *controls], shlex.split(line))
    assert "Fill in VAE_FILE" in note


def test_a_cache_folder_that_moved_with_its_data_names_the_files_where_they_were(tmp_path: Path) -> None:
    family, here, there = family_called("z_image"), tmp_path / "here", tmp_path / "there"
    here.mkdir()
    family.prepare(here)
    succeed_here(*family.cache_latents, folder=here)
    succeed_here(*family.cache_texts, folder=here)
    there.mkdir()
    config = [*family.cache_latents]
    config[config.index("dataset.toml")] = str(here / "dataset.toml")
    config[config.index("model/vae.safetensors")] = str(here / "model" / "vae.safetensors")

    line, missing = printed_next(succeed_here(*config, folder=there))
    (here / "model" / "text_encoder").rename(here / "model" / "elsewhere")
    _, missing_then = printed_next(succeed_here(*config, folder=there))

    assert missing == []
    assert is_row(["--text_encoder", str(here / "model" / "text_encoder")], shlex.split(line))
    assert missing_then == ["QWEN3_FILE"]


class StopAtSave(threading.Thread):
    """Ask a run to stop, as the page does, as soon as a file of it is there."""

    def __init__(self, output: Path, file: str) -> None:
        super().__init__(daemon=True)
        self.output = output
        self.file = file
        self.is_over = threading.Event()

    def run(self) -> None:
        while not (self.output / self.file).exists():
            if self.is_over.wait(0.01):
                return
        (self.output / "lora.stop").touch()


def test_after_a_stop_the_command_names_a_file_that_is_there(tmp_path: Path) -> None:
    family = family_called("z_image")
    family.prepare(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    output = tmp_path / "output"
    (tmp_path / "prompts.txt").write_text(f"{family.sample_line}\n", encoding="utf-8")
    samples = ["--sample_prompts", "prompts.txt"]
    saves = ["--max_train_steps", "2000", "--save_every_n_steps", "2"]
    stopping = StopAtSave(output, "lora-step00000002.safetensors")
    stopping.start()

    succeed_here(*family.train, *OUTPUT, *saves, *samples, folder=tmp_path)
    stopping.is_over.set()

    assert not (output / "lora.safetensors").exists()
    typed(page_commands(tmp_path)["Generate with it"][1], tmp_path)
    assert any((output / "generated").iterdir())


@pytest.mark.slow
def test_a_lora_that_continues_clips_is_given_a_clip_by_the_printed_command(tmp_path: Path) -> None:
    family = family_called("ltx_2")
    folder = tmp_path / "a folder \u00fc"
    folder.mkdir()
    family.prepare(folder)
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    train = [*without_encoders(family.train), "--ltx2_extend_prefix_frames", "1"]

    succeed_here(*train, *OUTPUT, "--max_train_steps", "1", folder=folder)

    note, line = page_commands(folder)["Generate with it"]
    assert note.startswith("Fill in CLIP_FILE first")
    assert is_row(["--extend_prefix", "CLIP_FILE", "--extend_prefix_frames", "1"], shlex.split(line))
    clip = next((folder / "clips").glob("*.mp4"))
    small = ["--video_size", "32", "32", "--infer_steps", "1", "--video_length", "9"]
    typed(line.replace("CLIP_FILE", shlex.quote(str(clip))), folder, small)
    assert any((folder / "output" / "generated").iterdir())
