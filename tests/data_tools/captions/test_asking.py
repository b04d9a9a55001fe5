"""The frames that are shown, the caption in an answer, and what becomes of a caption that is edited."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.captions import places
from data_tools.captions.asking import (
    AskOptions,
    CaptionInput,
    WordingOptions,
    parse_caption,
    read_sampled_frames,
    reword,
    select_frames,
)
from data_tools.captions.local_model import CaptionModelOptions, LocalModel, load_model
from data_tools.captions.places import CaptionList, LineChange, find_caption_locations
from data_tools.captions.run import run_captioning
from dataset.config import load_dataset_config
from dataset.sources.captions import complete_captions
from modules.errors import CheckpointError, MemoryPlanError, OutputError
from tests.data_tools.captions.making import make_folder, options_of, read_captions
from tests.dataset.making import frame_numbers, make_animation, make_clip, make_frames, make_image, make_table
from tests.tiny.vision_model import TEMPLATE, WORDS, write_llava, write_qwen


@pytest.mark.parametrize(
    ("num_frames", "wanted", "chosen"),
    [(81, 3, (13, 40, 67)), (4, 8, (0, 1, 2, 3)), (0, 8, ())],
)
def test_frames_are_the_middles_of_equal_parts(num_frames: int, wanted: int, chosen: tuple[int, ...]) -> None:
    assert select_frames(num_frames, wanted) == chosen


@pytest.mark.parametrize("suffix", [".mkv", ""])
def test_clips_of_all_kinds_are_sampled_alike(suffix: str, tmp_path: Path) -> None:
    make = make_clip if suffix else make_frames  # a Matroska header has no count
    path = make(tmp_path / f"clip{suffix}", 12)

    assert frame_numbers(read_sampled_frames(path, False, 3, 10**6)) == [2, 6, 10]


def test_animations_and_images_are_read_and_large_frames_scaled_down(tmp_path: Path) -> None:
    make_animation(tmp_path / "a.gif", [100] * 4)

    (frame,) = read_sampled_frames(make_image(tmp_path / "b.png", (200, 100)), True, 8, 5000)
    assert frame.shape == (50, 100, 3)
    assert frame_numbers(read_sampled_frames(tmp_path / "a.gif", False, 2, 10**6)) == [1, 3]


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ('  "a cat\n\n walks." \r\n', "a cat walks."),
        ("<think>what\nis it</think> a cat<|im_end|></s>", "a cat"),
        ("a\0cat \ud800", "acat"),
        ("\x1b[1;31ma red\x1b[0m cat\x9b2J", "a red cat"),
        ("\x1b]0;title\x07a \x1b]8;;http://host\x1b\\cat\x1b]8;;\x1b\\ walks\x1b", "a cat walks"),
        ("a\u2028cat\x85 \u202ewalks\u2069", "a cat walks"),
        ("2 < 3 and <b> stays", "2 < 3 and <b> stays"),
    ],
)
def test_an_answer_becomes_one_line(answer: str, caption: str) -> None:
    assert parse_caption(answer, False) == caption


def test_words_are_put_in_as_the_keys_of_a_table_do_and_not_twice(tmp_path: Path) -> None:
    words = {"trigger_word": "zxc", "caption_prefix": "A video of", "caption_suffix": "in 4k."}
    table, around = make_table(tmp_path, "image_directory", **words), WordingOptions(**words)
    for caption in ("a cat", "the zxc dog", ""):
        (by_table,) = complete_captions([caption], table)

        assert reword(caption, around) == by_table
        assert reword(by_table, around) == by_table
    assert reword("a cat\n\na dog", around) == "A video of zxc, a cat\n\na dog in 4k."


def test_texts_are_replaced_in_order_before_words_are_put_in() -> None:
    wording = WordingOptions.from_defaults(
        trigger_word="cat",
        replace=(("dog", "cat"), ("cat runs", "bird")),
        replace_regex=((r"(\w+)s\b", r"\1S"), ("x", "")),
    )

    assert reword("dog runs", wording) == "cat, bird"
    assert reword("two dogs x", wording) == "cat, two catS"


ASK = AskOptions.from_defaults(prompt="a cat", max_pixels=4096, max_new_tokens=8)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llavá 1"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen"))


def load(folder: Path, batch_size: int = 1, **ask: Any) -> LocalModel:
    options = CaptionModelOptions.from_defaults(model=str(folder), batch_size=batch_size, device="cpu")
    return load_model(options, dataclasses.replace(ASK, **ask))


def make_jobs(folder: Path) -> list[CaptionInput]:
    """Three sources with one, two and three frames of noise."""
    places = find_caption_locations(load_dataset_config(make_folder(folder)), False)
    rng = np.random.default_rng(0)
    return [
        CaptionInput(
            place, tuple(rng.integers(0, 256, (24 + 8 * count, 32, 3), np.uint8) for _ in range(count))
        )
        for count, place in enumerate(places, 1)
    ]


@pytest.mark.parametrize(("name", "temperature"), [("llava", 0.0), ("qwen", 1.0)])
def test_a_batch_gives_what_each_gives_alone(
    name: str, temperature: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(name), temperature=temperature)
    jobs = make_jobs(tmp_path)

    together = model.generate_answers(jobs)
    assert together == [model.generate_answers([job])[0] for job in jobs]
    assert all(was_cut and set(text.split()) <= set(WORDS) for text, was_cut in together)
    if temperature:
        assert len(set(together)) == 3
        reseeded = dataclasses.replace(model.ask_options, seed=1)
        assert together != dataclasses.replace(model, ask_options=reseeded).generate_answers(jobs)


def test_captions_of_clips_are_written_through_the_loop(llava: Path, tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(2):
        make_clip(clips / f"{number}.mp4", 9)
    with config.open("a", encoding="utf-8") as file:
        file.write(f"[[datasets]]\nvideo_directory = {str(clips)!r}\ncaption_extension = '.cap'\n")
    words = ("--model", llava, "--max_new_tokens", "5", "--batch_size", "2", "--trigger_word", "zxc")
    run_captioning(load_dataset_config(config), options_of(config, *words, "--num_frames", "3"))

    texts = [*read_captions(tmp_path).values(), *(path.read_text() for path in clips.glob("*.cap"))]
    assert len(texts) == 5
    assert all(text.startswith("zxc, ") and len(text.split()) == 6 for text in texts)


def test_messages_are_made_by_the_template_that_is_there(llava: Path, tmp_path: Path) -> None:
    model = load(llava, system_prompt="be short")
    assert model.format_prompt("what", 2) == "<system> be short <user>  <image>  <image> what <model> "

    folder = shutil.copytree(llava, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    plain = load(folder, system_prompt="be short")
    assert plain.format_prompt("what", 2) == "be short\n<image><image>\nwhat"
    assert load(folder).generate_answers(make_jobs(tmp_path))[0][0]

    plain.processor.tokenizer.chat_template = "{% for turn in messages %}[{{ turn.content }}]{% endfor %}"
    assert plain.format_prompt("what", 1) == "[be short][<image>\nwhat]"


def test_one_that_fails_in_a_batch_costs_only_itself(llava: Path, tmp_path: Path) -> None:
    model = load(llava, batch_size=3)
    jobs = make_jobs(tmp_path)
    frames = dict(jobs)
    frames[jobs[1][0]] = (np.zeros((0, 4, 3), np.uint8),)

    answers = list(model.caption([job for job, _ in jobs], frames.__getitem__))
    assert [isinstance(text, str) for _, text in answers] == [True, False, True]


def test_a_full_memory_ends_the_run_with_advice(llava: Path, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    model = load(llava)
    model.model.generate = fail
    jobs = make_jobs(tmp_path)

    with pytest.raises(MemoryPlanError, match="--batch_size, --num_frames or --max_pixels"):
        list(model.caption([jobs[0][0]], lambda job: jobs[0][1]))


def test_a_thought_that_the_template_begins_is_no_caption(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "thinking")
    (folder / "chat_template.jinja").write_text(f"{TEMPLATE}<think>\n", encoding="utf-8")
    model = load(folder)
    job, frames = make_jobs(tmp_path)[0]

    ((_, answer),) = model.caption([job], lambda _: frames)
    assert "--max_new_tokens ended it" in str(answer)


def _change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_code_in_a_model_is_never_run(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    classes = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText"), "evil.X")
    for name in ("config.json", "processor_config.json"):
        _change(folder, name, model_type="evil", processor_class=None, auto_map=classes)

    with pytest.raises(CheckpointError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_read(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weights = load(llava).model.state_dict()
    torch.save(weights, folder / "pytorch_model.bin")  # a harmless one

    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder)


def open_list(folder: Path, text: str) -> CaptionList:
    (folder / "list.jsonl").write_bytes(text.encode("utf-8"))
    return CaptionList(make_table(folder, "video_jsonl_file"))


def put(captions: CaptionList, path: str, text: str) -> bool:
    return captions.write({path: LineChange({"caption": None}, {"caption": text})}, False) > 0


@pytest.mark.parametrize(
    "line",
    [
        '{"video_path": "a", "n": [1.0, {"b": "}"}], "c": 123456789012345678901234567890}',
        '{"caption": "first", "video_path": "a", "half": "\\ud800", "caption": null}',
    ],
)
def test_a_changed_line_keeps_its_other_values(line: str, tmp_path: Path) -> None:
    captions = open_list(tmp_path, line)

    assert put(captions, "a", 'é "x"')

    assert json.loads(captions.path.read_text(encoding="utf-8")) == {**json.loads(line), "caption": 'é "x"'}


def test_a_list_keeps_its_other_lines_its_ends_its_mark_and_its_first_state(tmp_path: Path) -> None:
    text = '\ufeff{"video_path": "a", "z": 1.0}\r\n{"video_path":"b","caption":"hand"}\r\n{"video_path": "c"}'
    captions = open_list(tmp_path, text)

    put(captions, "a", "new a")
    put(captions, "c", "new c")

    assert captions.path.read_bytes().decode("utf-8") == (
        '\ufeff{"video_path": "a", "z": 1.0, "caption": "new a"}\r\n'
        '{"video_path":"b","caption":"hand"}\r\n{"video_path": "c", "caption": "new c"}'
    )
    assert (tmp_path / "list.jsonl.bak").read_bytes().decode("utf-8") == text
    assert sorted(one.name for one in tmp_path.glob("*list*")) == ["list.jsonl", "list.jsonl.bak"]


def test_what_is_written_into_a_list_meanwhile_stays(tmp_path: Path) -> None:
    captions = open_list(tmp_path, '{"video_path": "a"}\n{"video_path": "b"}\n')
    more = '{"video_path": "new"}\n{"video_path": "b", "n": 1}\n{"video_path": "a", "caption": "hand"}\n{"vid'
    captions.path.write_text(more, encoding="utf-8")

    assert put(captions, "b", "x")
    assert not put(captions, "a", "x")

    assert captions.path.read_text(encoding="utf-8") == more.replace('"n": 1', '"n": 1, "caption": "x"')


def test_what_is_saved_while_a_caption_is_written_stays_and_a_list_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = open_list(tmp_path, '{"video_path": "a"}\n')
    copy, by_hand = places.shutil.copymode, '{"video_path": "a", "saved": "by hand"}\n'

    def save_then_copy(path: Path, temporary: Path) -> None:
        if "saved" not in path.read_text(encoding="utf-8"):
            path.write_text(by_hand, encoding="utf-8")
        copy(path, temporary)

    monkeypatch.setattr(places.shutil, "copymode", save_then_copy)

    assert put(captions, "a", "x")
    assert json.loads(captions.path.read_text(encoding="utf-8")) == {**json.loads(by_hand), "caption": "x"}
    captions.path.unlink()
    monkeypatch.setattr(places, "RETRY_SECONDS", 0)
    with pytest.raises(OutputError, match="the list is gone"):
        put(captions, "a", "x")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            ("text_config", "hidden_size"),
            1 << 20,
            "describes a network of .* parameters, but its weights have",
        ),
        (("text_config", "num_hidden_layers"), 10**6, "num_hidden_layers is 1,000,000, but at most"),
        (
            ("vision_config", "image_size"),
            1 << 20,
            "describes a network of .* parameters, but its weights have",
        ),
    ],
)
def test_sizes_that_the_weights_do_not_show_are_refused(
    llava: Path, tmp_path: Path, keys: tuple[str, str], value: int, message: str
) -> None:
    folder = shutil.copytree(llava, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[keys[0]][keys[1]] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "size",
    [{"height": 100_000, "width": 100_000}, {"shortest_edge": 60_000}, {"longest_edge": 1 << 30}],
)
def test_a_processor_makes_no_giant_pictures(llava: Path, tmp_path: Path, size: dict[str, int]) -> None:
    folder = shutil.copytree(llava, tmp_path / "model")
    path = next(folder.glob("*processor_config.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    content.get("image_processor", content)["size"] = size
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"processor_config.json: \w+ is .*, but the (longest side|maximum)"
    ):
        load(folder)
