"""The samples of a described folder: rows of prompts.txt, in which only what was typed is changed."""

import functools
import re
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders.captions import compute_checksum
from browser.folders.draft_changes import check_text
from browser.folders.sample_rows import FIELDS, edit_prompts, edit_sampling_intervals, list_images, read_rows
from modules.errors import OptionError
from tests.browser.drafts import PROMPTS, RUN, unfold, write_draft
from tests.browser.serving import Answer, Served, serve_runs
from tests.chromium import open_page, wait_until
from tests.waiting import MILLISECONDS, wait_for


def fields_of(text: str, **typed: str) -> dict[str, str]:
    """The fields of the rows of a prompts.txt, three at least, with other texts in some: `width_2`."""
    rows = read_rows(text)
    fields = {f"has {name}": "yes" for name in FIELDS}
    for number in range(1, max(3, len(rows)) + 1):
        row = rows[number - 1] if number <= len(rows) else None
        fields[f"row {number}"] = "yes"
        if row is not None:
            fields |= {f"line {number}": str(row.line), f"prompt {number}": row.prompt}
            fields |= {f"{name} {number}": value for name, value in row.texts.items()}
    return fields | {name.replace("_", " "): value for name, value in typed.items()}


def accept(text: str) -> None:
    """Take any path for a picture."""


def edit(text: str = PROMPTS, **typed: str) -> str:
    return edit_prompts(text, fields_of(text, **typed), accept)


def send(served: Served, folder: Path, what: str, base: str = PROMPTS, **typed: str) -> Answer:
    fields = fields_of(base, **typed)
    fields |= {"folder": str(folder), "base": base, "have": compute_checksum(base.encode())}
    fields |= {"have run": compute_checksum(RUN.encode()), "complete": "yes", "every": "200", "first": "yes"}
    fields |= {name: value for name, value in typed.items() if name in ("every", "first")}
    origin = {"Origin": served.url, "Content_Type": "application/x-www-form-urlencoded"}
    return served.ask(f"/new/samples/{what}", "POST", urlencode(fields), **origin)


def has_line(path: Path, line: str) -> bool:
    return line in path.read_text(encoding="utf-8")


def test_a_row_shows_its_line() -> None:
    first, second = read_rows(PROMPTS)
    assert first.prompt == "fluff, in falling snow"
    sizes = {"width": "64", "height": "64", "frames": "1"}
    assert first.texts == {**sizes, "seed": "1", "steps": "4", "negative": "ugly"}
    assert first.more == ""
    assert (second.line, second.texts) == (3, {"width": "64", "seed": "2"})


def test_of_an_option_given_twice_the_last_counts() -> None:
    text = "a cat --w 64 --width 32\n"
    (row,) = read_rows(text)
    assert row.texts == {"width": "32"}
    assert edit(text, width_1="48") == "a cat --w 64 --width 48\n"
    assert edit(text, width_1="") == "a cat\n"


def test_of_several_pictures_of_a_line_the_field_holds_the_last_and_the_others_stay() -> None:
    text = "a cat --ci a.png --ci b.png\n"
    (row,) = read_rows(text)
    assert (row.texts, row.more) == ({"source": "b.png"}, "--ci a.png")
    assert edit(text, source_1="c.png") == "a cat --ci a.png --ci c.png\n"
    assert edit(text, source_1="") == "a cat --ci a.png\n"


def test_nothing_typed_leaves_every_byte() -> None:
    text = "  # mine\n a  cat   --w 64   --n  ugly \n\n\tb --zz 3 --W  64"
    assert edit(text) == text
    assert edit() == PROMPTS


def test_only_what_was_typed_is_changed() -> None:
    changed = edit(width_1="96", seed_1="", height_2="80", prompt_2="fluff, on a boat")
    assert changed == PROMPTS.replace(
        "--w 64 --h 64 --f 1 --n ugly  --d 1 --s 4", "--w 96 --h 64 --f 1 --n ugly  --s 4"
    ).replace("fluff, in a kitchen --W 64 --d 2", "fluff, on a boat --W 64 --d 2 --h 80")


def test_a_new_row_goes_to_the_end_and_an_emptied_one_goes() -> None:
    assert edit(prompt_3="a dog\nruns", seed_3="7") == f"{PROMPTS}a dog runs --d 7\n"
    assert edit(prompt_1="") == PROMPTS.replace(PROMPTS.splitlines(keepends=True)[1], "")
    assert edit("a cat", prompt_2="a dog") == "a cat\na dog\n"
    assert edit("", prompt_1="a dog") == "a dog\n"


def test_options_of_a_prompt_are_taken_as_they_are_typed() -> None:
    assert edit(prompt_3="a dog --n blurry", width_3="64").endswith("a dog --n blurry --w 64\n")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"width_1": "wide"}, "Sample 1 width: wide is not a whole number above 0"),
        ({"frames_2": "0"}, "Sample 2 frames: 0 is not a whole number above 0"),
        ({"steps_1": "-3"}, "Sample 1 steps: -3"),
        ({"height_1": "9" * 5000}, "Sample 1 height: 9+... .* is not a whole number"),
        ({"guidance_1": "strong"}, "Sample 1 guidance: strong is not a number, such as 4 or 3.5"),
        ({"seed_1": "1 --w 5"}, "Sample 1 seed: 1 --w 5: omit the dashes"),
        ({"seed_3": "5"}, "Sample 3: the prompt is empty. Write one."),
        ({"prompt_3": "# no prompt"}, "Sample 3: a line that begins with # is a comment"),
    ],
)
def test_what_makes_no_line_is_refused(typed: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        edit(**typed)


def test_how_often_is_written_into_run_toml() -> None:
    assert edit_sampling_intervals(RUN, {"every": "200", "first": "yes"}) == RUN
    changed = edit_sampling_intervals(RUN, {"every": "50"})
    assert changed == RUN.replace("n_steps = 200\n", "n_steps = 50\n").replace("sample_at_first = true\n", "")
    without = RUN.replace('sample_prompts = "prompts.txt"\nsample_every_n_steps = 200\n', "")
    assert 'sample_prompts = "prompts.txt"\n' in edit_sampling_intervals(
        without, {"every": "9", "first": "yes"}
    )
    with pytest.raises(OptionError, match="often is not a whole number"):
        edit_sampling_intervals(RUN, {"every": "often"})


@pytest.mark.parametrize(
    ("typed", "told", "number"),
    [
        ({"width_1": "65"}, "%s 65: use a multiple of 16. The sample is generated with 64.", 1),
        ({"frames_1": "8"}, "%s 8: use a length of 4n + 1. The sample is generated with 5.", 1),
        ({"height_2": "40"}, "%s 40: use a multiple of 16. The sample is generated with 32.", 2),
        ({"width_1": "96"}, "", 0),
    ],
)
def test_a_size_that_the_model_cannot_make_is_told_at_its_row_and_in_the_text(
    typed: dict[str, str], told: str, number: int, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path)
    (name,) = (name.partition("_")[0] for name in typed)
    at_field = told.replace("%s", name).replace("frames 8", "8 frames")
    with serve_runs(tmp_path) as served:
        looked = send(served, folder, "look", **typed).text
        saved = send(served, folder, "save", **typed)
    assert saved.status == 200
    for text in (looked, saved.text):
        notes = re.findall(r'id="sizes-(\d+)" class="warn sizes" role="status">([^<]+)<', text)
        assert notes == ([(str(number), at_field)] if told else [])
        assert '<p class="warn" role="status">prompts.txt' not in text  # said once
    text = (folder / "prompts.txt").read_text(encoding="utf-8")
    line = {1: 2, 2: 4}.get(number)
    in_text = f"prompts.txt, {told.replace('%s', f'line {line}, --{name[0]}')}" if told else ""
    assert check_text("prompts.txt", text, folder, RUN) == in_text


def test_rows_are_saved_at_once(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        saved = send(served, folder, "save", width_1="96")
    assert saved.status == 200
    assert (folder / "prompts.txt").read_text(encoding="utf-8") == PROMPTS.replace("--w 64", "--w 96")
    assert (folder / "run.toml").read_text(encoding="utf-8") == RUN


@pytest.mark.parametrize("name", ["prompts.txt", "run.toml"])
def test_a_file_that_changed_meanwhile_is_not_overwritten(name: str, tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write("# theirs\n")
    theirs = (folder / name).read_text(encoding="utf-8")
    with serve_runs(tmp_path) as served:
        answer = send(served, folder, "save", prompt_2="fluff, on a boat")
    assert answer.status == 422
    assert "has changed in the meantime" in answer.text
    assert "+fluff, on a boat --W 64 --d 2" in answer.text
    assert (folder / name).read_text(encoding="utf-8") == theirs


def test_rows_of_a_folder_without_prompts_are_blank(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    (folder / "prompts.txt").unlink()
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/samples?folder={quote(str(folder))}").text
        assert page.count('<li id="sample-') == 3
        saved = send_new(served, folder, "save", "a dog")
    assert saved.status == 200
    assert (folder / "prompts.txt").read_text(encoding="utf-8") == "a dog\n"


def send_new(served: Served, folder: Path, what: str, prompt: str) -> Answer:
    """Send the first prompt of a folder that has no prompts.txt."""
    fields = fields_of("", prompt_1=prompt)
    fields |= {"folder": str(folder), "have run": compute_checksum(RUN.encode()), "complete": "yes"}
    fields |= {"every": "200", "first": "yes"}
    origin = {"Origin": served.url, "Content_Type": "application/x-www-form-urlencoded"}
    return served.ask(f"/new/samples/{what}", "POST", urlencode(fields), **origin)


def test_prompts_in_another_file_are_left_alone(tmp_path: Path) -> None:
    folder = write_draft(tmp_path, run=RUN.replace('"prompts.txt"', '"mine.toml"'))
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/samples?folder={quote(str(folder))}").text
    assert "The prompts are in mine.toml" in page
    assert "<textarea" not in page


def test_pictures_are_chosen_from_the_folder(tmp_path: Path) -> None:
    folder = write_draft(tmp_path / "root", pictures=3)
    (folder / "control").mkdir()
    (folder / "p0.png").rename(folder / "control" / "p0.png")
    (folder / "cache").mkdir()
    (folder / "p1.png").rename(folder / "cache" / "p1.png")
    assert list_images(folder) == ["p2.png", "control/p0.png"]
    (tmp_path / "secret.png").write_bytes(b"x")
    base = PROMPTS
    with serve_runs(tmp_path / "root") as served:
        for path in ("../../secret.png", str(tmp_path / "secret.png"), "run.toml", "none.png", "control"):
            answer = send(served, folder, "look", base, source_1=path)
            assert "there is no such image" in answer.text, path
        assert "+fluff" in send(served, folder, "look", base, source_1="control/p0.png").text


@pytest.mark.parametrize(
    ("task", "label"), [("i2v-14B-480p", "starts from"), ("t2v-1.3B", ""), ("edit", "is made from")]
)
def test_models_that_need_a_picture_have_a_field_for_it(task: str, label: str, tmp_path: Path) -> None:
    run = RUN.replace("t2v-1.3B", task)
    if task == "edit":
        run = run.replace('"--family", "wan"', '"--family", "qwen_image"')
    folder = write_draft(tmp_path, run=run)
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/samples?folder={quote(str(folder))}").text
    for text in ("starts from", "is made from"):
        assert (text in page) == (text == label)


def test_markup_in_a_prompt_is_shown_as_text(tmp_path: Path) -> None:
    folder = write_draft(tmp_path, prompts='</textarea><script>x</script> --zz "><b>\n')
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/samples?folder={quote(str(folder))}").text
    assert "<script" not in page
    assert "<b>" not in page


def test_read_only_saves_nothing(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path, read_only=True) as served:
        assert "<button" not in served.ask(f"/new/samples?folder={quote(str(folder))}").text
        assert send(served, folder, "save", width_1="96").status == 403


def test_samples_are_edited_by_their_labels(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        wait_until(page, "document.querySelector('#sample-form') !== null")
        wait_until(page, "document.querySelector('#set-sample_every_n_steps') !== null")
        page.get_by_label("Sample 3 prompt").fill("a dog")
        page.get_by_role("button", name="One more sample").click()
        wait_until(page, "document.activeElement === document.querySelector('#prompt-4')")
        assert page.get_by_label("Sample 3 prompt").input_value() == "a dog"
        page.get_by_label("Sample 4 prompt").fill("a hen")
        page.get_by_label("Sample 4 seed").fill("9")
        page.get_by_label("Generated after every").fill("50")
        wait_until(page, "document.querySelector('#changes-samples').textContent.includes('_steps = 50')")
        page.get_by_role("button", name="Save the samples").click()
        wait_until(page, "document.querySelector('#changes-samples').textContent.includes('Saved into')")
        # the table of all settings follows
        wait_until(page, "document.querySelector('#set-sample_every_n_steps').value === '50'")
        assert page.problems == []
    assert (folder / "prompts.txt").read_text(encoding="utf-8") == f"{PROMPTS}a dog\na hen --d 9\n"
    assert "sample_every_n_steps = 50\n" in (folder / "run.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", ["a cat on a mat, " * 1250, "猫が好き" * 5000])
def test_a_prompt_of_20000_characters_becomes_a_line(tmp_path: Path, prompt: str) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        looked = send(served, folder, "look", prompt_1=prompt.strip())
        saved = send(served, folder, "save", prompt_1=prompt.strip())
        assert (looked.status, saved.status) == (200, 200)
    text = (folder / "prompts.txt").read_text(encoding="utf-8")
    assert text == PROMPTS.replace("fluff, in falling snow", prompt.strip())


@pytest.mark.parametrize("way", ["button", "enter"])
@pytest.mark.parametrize(
    ("label", "button", "file", "line"),
    [
        ("Sample 2 seed", "Save the samples", "prompts.txt", "--d {}"),
        ("set to seed", "Save these changes", "run.toml", "seed = {}"),
        ("prompts.txt as text", "Save prompts.txt", "prompts.txt", "{}"),
    ],
)
def test_what_was_just_typed_is_saved_and_no_preview_follows(
    way: str, label: str, button: str, file: str, line: str, tmp_path: Path
) -> None:
    """Pressed at once, and a moment after the preview was asked for."""
    if way == "enter" and "text" in label:
        pytest.skip("Enter begins a line there")
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        wait_until(page, "document.querySelector('#sample-form') !== null")
        wait_until(page, "document.querySelector('#set-seed') !== null")
        unfold(page, "settings")
        field = page.locator("#set-seed") if label == "set to seed" else page.get_by_label(label)
        if "text" in label:
            page.get_by_text("prompts.txt", exact=True).last.click()
        for pause, number in ((0, "777"), (510, "1234")):
            field.fill(number)
            page.wait_for_timeout(pause)
            if way == "enter":
                field.press("Enter")
            else:
                page.get_by_role("button", name=button, exact=True).click()
            wait_for(
                functools.partial(has_line, folder / file, line.format(number)),
                pause=lambda seconds: page.wait_for_timeout(seconds * MILLISECONDS),
            )
            page.wait_for_timeout(1500)  # a late preview would take its place
            saved = [part.text_content() or "" for part in page.locator(".changes [role=status]").all()]
            assert f"Saved into {file}" in "".join(saved)
            assert "Not saved yet" not in page.content()
        assert page.problems == []


def test_enter_in_the_search_saves_nothing(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        wait_until(page, "document.querySelector('#set-seed') !== null")
        unfold(page, "settings")
        page.locator("#set-seed").fill("5")
        page.get_by_label("Look for a setting").fill("seed")
        page.get_by_label("Look for a setting").press("Enter")
        page.wait_for_timeout(500)
    assert (folder / "run.toml").read_text(encoding="utf-8") == RUN
