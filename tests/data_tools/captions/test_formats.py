"""Captions that are JSON objects: asked for key by key, checked, asked for again, and made of sentences."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import ideogram4.captions
from data_tools.captions.run import run_captioning
from dataset.config import load_dataset_config
from dataset.sources.captions import complete_captions
from fibo_2.captions import FORMAT, find_caption_errors
from modules.errors import DatasetError, OptionError
from protocols.families import caption_formats
from tests.data_tools.captions.making import (
    FakeServer,
    Reply,
    make_folder,
    make_list,
    options_of,
    read_captions,
    read_lines,
    run_server,
)
from tests.dataset.making import make_table

GOOD = {"short_description": "a red square", "lighting": {"conditions": "even"}, "objects": []}
TEXT = json.dumps(GOOD)


def ask(config: Path, reply: Reply, *words: str) -> FakeServer:
    with run_server(reply) as server:
        given = ("--api_base", server.address, "--api_model", "m", "--api_workers", "1")
        options = options_of(config, *given, "--caption_format", "fibo_2", *words)
        run_captioning(load_dataset_config(config), options)
    return server


def questions_of(server: FakeServer) -> list[str]:
    return [body["messages"][-1]["content"][-1]["text"] for body in server.bodies]


def test_the_question_names_every_key_and_part_and_the_answer_has_room(tmp_path: Path) -> None:
    server = ask(make_folder(tmp_path), lambda *_: TEXT)

    assert caption_formats() == {"fibo_2": FORMAT, "ideogram4": ideogram4.captions.FORMAT}
    for question in questions_of(server):
        for key in FORMAT.keys:
            assert all(f'"{name}"' in question for name in (key.name, *key.parts))
    assert {body["max_tokens"] for body in server.bodies} == {2048}
    captions = read_captions(tmp_path)
    assert len(captions) == 3
    assert all(json.loads(text) == GOOD for text in captions.values())


@pytest.mark.parametrize(
    "answer",
    [
        f"```json\n{json.dumps(GOOD, indent=2)}\n```",
        f"<think>{{what?}}</think>Here it is: {TEXT} I hope this helps!",
        TEXT.replace("a red square", "a\\nred \\u201csquare\\u201d"),
    ],
)
def test_an_object_is_found_in_what_models_say_around_it(answer: str, tmp_path: Path) -> None:
    ask(make_folder(tmp_path), lambda *_: answer)

    for text in read_captions(tmp_path).values():
        assert find_caption_errors(text) == []
        assert "\n" not in text


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("a red square", "contains no JSON object"),
        ('{"short_description": "a red', "raise --max_new_tokens"),
        ('{"short_description": "a", "objects": [}', "it is not JSON"),
        ('{"objects": []}', "short_description is missing"),
        ('{"short_description": "a", "lightning": {}}', "lighting is meant"),
        ('{"short_description": "a", "objects": [{"location": "left"}]}', "entry 1: description is missing"),
    ],
)
def test_a_wrong_answer_is_told_and_asked_for_again_with_its_fault(
    wrong: str, fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        server = ask(config, lambda number, _: wrong if number == 1 else TEXT)

    assert [json.loads(text) for text in read_captions(tmp_path).values()] == [GOOD] * 3
    assert len(server.bodies) == 4
    assert fault in questions_of(server)[3]
    assert fault in caplog.text
    assert "Asking again" in caplog.text
    images = [body["messages"][-1]["content"][0] for body in server.bodies]
    assert images[3] == images[1]


def test_what_stays_wrong_is_left_out_with_its_reason(tmp_path: Path) -> None:
    config = make_folder(tmp_path)

    def reply(number: int, body: dict[str, Any]) -> str:
        return "{}" if number == 0 or "Your last answer was wrong" in str(body["messages"]) else TEXT

    message = "(?s)1 of 3 got no caption.*2 answers are wrong, the last: short_description is missing"
    with pytest.raises(DatasetError, match=message):
        ask(config, reply)
    assert len(read_captions(tmp_path)) == 2


def test_keys_that_answers_leave_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ask(make_folder(tmp_path), lambda *_: TEXT)

    assert "context in 3" in caplog.text
    assert "short_description in" not in caplog.text


@pytest.mark.parametrize("is_list", [False, True])
def test_sentences_become_objects_on_request_and_are_kept(is_list: bool, tmp_path: Path) -> None:
    plain, written = "zxc, a red\nsquare", '{"short_description": "mine"}'
    if is_list:
        lines = [json.dumps({"image_path": "{}", "caption": text}) for text in (plain, written)]
        config = make_list(tmp_path, [*(line.replace('"{}"', "{}") for line in lines), '{"image_path": {}}'])
    else:
        config = make_folder(tmp_path, {"a": plain, "b b": written})
    server = ask(config, lambda *_: TEXT, "--convert_plain")

    now = [line["caption"] for line in read_lines(tmp_path)] if is_list else read_captions(tmp_path).values()
    first, second, third = map(str, now)
    assert json.loads(first) == json.loads(third) == GOOD
    assert second == written
    assert [("zxc, a red square" in question) for question in questions_of(server)] == [True, False]
    kept = tmp_path / "list.jsonl.bak" if is_list else tmp_path / "im ages" / "a.txt.bak"
    assert "zxc, a red" in kept.read_text(encoding="utf-8")


def test_sentences_stay_where_nobody_asks_for_objects_of_them(tmp_path: Path) -> None:
    config = make_folder(tmp_path, {"a": "a plain one"})
    server = ask(config, lambda *_: TEXT)

    assert read_captions(tmp_path)["a"] == "a plain one"
    assert len(server.bodies) == 2


def test_words_go_into_the_texts_of_an_object(tmp_path: Path) -> None:
    words = ("--trigger_word", "zxc", "--caption_suffix", "on film", "--replace", "even", 'so "even"')
    ask(make_folder(tmp_path), lambda *_: TEXT, *words)

    changed = {
        **GOOD,
        "short_description": "zxc, a red square on film",
        "lighting": {"conditions": 'so "even"'},
    }
    assert [json.loads(text) for text in read_captions(tmp_path).values()] == [changed] * 3


def edit(config: Path, *words: str) -> None:
    run_captioning(load_dataset_config(config), options_of(config, "--edit_only", *words))


def test_words_around_an_object_are_refused_without_its_format(tmp_path: Path) -> None:
    config = make_folder(tmp_path, {"a": TEXT, "ç": "plain"})
    with pytest.raises(OptionError, match=r"a.png: .* by --caption_format \(fibo_2, ideogram4\)"):
        edit(config, "--trigger_word", "zxc")
    assert read_captions(tmp_path) == {"a": TEXT, "ç": "plain"}

    edit(config, "--trigger_word", "zxc", "--caption_format", "fibo_2")
    edit(config, "--replace", "red", '"red"')
    edited = read_captions(tmp_path)
    assert json.loads(edited["a"]) == {**GOOD, "short_description": 'zxc, a "red" square'}
    assert edited["ç"] == "zxc, plain"
    edit(config, "--trigger_word", "zxc", "--caption_format", "fibo_2")  # it is there
    assert read_captions(tmp_path) == edited


def test_words_of_a_table_go_into_the_text_of_an_object(tmp_path: Path) -> None:
    words = {"trigger_word": "zxc", "caption_prefix": "A photo:", "caption_suffix": "on film"}
    table = make_table(tmp_path, "image_directory", **words)
    (completed,) = complete_captions([TEXT], table)
    assert json.loads(completed) == {**GOOD, "short_description": "A photo: zxc, a red square on film"}

    has_word = json.dumps({**GOOD, "context": "of zxc"})
    (kept,) = complete_captions([has_word], make_table(tmp_path, "image_directory", trigger_word="zxc"))
    assert json.loads(kept) == json.loads(has_word)
    others = ['{"edit_instruction": "add a hat"}', "{a|b} cat"]
    assert complete_captions(others, make_table(tmp_path, "image_directory", trigger_word="zxc")) == (
        '{"edit_instruction": "zxc, add a hat"}',
        "zxc, {a|b} cat",
    )


def test_a_word_without_a_place_in_the_object_is_refused(tmp_path: Path) -> None:
    config = make_folder(tmp_path, {"a": '{"edit_instruction": "add a hat"}'})
    with pytest.raises(OptionError, match="short_description, and it has none"):
        edit(config, "--trigger_word", "zxc", "--caption_format", "fibo_2")


def test_formats_that_do_not_exist_and_captions_of_edits_are_refused(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    with pytest.raises(OptionError, match="Choose from fibo_2"):
        options_of(config, "--edit_only", "--trigger_word", "a", "--caption_format", "fibo")
    with pytest.raises(OptionError, match="convert_plain"):
        options_of(config, "--model", "m", "--convert_plain")
    (tmp_path / "before").mkdir()
    with config.open("a", encoding="utf-8") as file:
        file.write(f"control_directory = {str(tmp_path / 'before')!r}\n")
    with pytest.raises(OptionError, match="before an edit"):
        ask(config, lambda *_: TEXT)


def test_lines_of_a_list_with_pictures_before_an_edit_are_refused(tmp_path: Path) -> None:
    config = make_list(tmp_path, ['{"image_path": {}, "control_path": {}}'] * 3)

    with pytest.raises(OptionError, match="has images before an edit"):
        ask(config, lambda *_: TEXT)

    assert all("caption" not in line for line in read_lines(tmp_path))
