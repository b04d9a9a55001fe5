"""All settings of a folder: what is typed is checked by the script and written, and nothing else."""

import contextlib
import dataclasses
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders.captions import compute_checksum
from browser.folders.described_folder import FILES, ChangedMeanwhileError, change_keys, edit_toml
from browser.folders.draft_changes import check_text, describe_difference, find_caching_argv, read_keys
from browser.folders.training_settings import read_settings
from browser.pages.folder_settings.dataset_keys import DatasetKeys
from browser.pages.folder_settings.folder_settings import (
    apply_edits,
    list_rows,
    name_field,
    parse_proposed_run,
)
from browser.pages.folder_settings.setting_words import DATASET_KEYS, WORDS
from dataset.config import load_dataset_config
from dataset.subset_options import SubsetOptions
from modules.errors import DatasetError, OptionError
from modules.options import get_field_default, option_name
from project.kinds.composing import kinds_by_script
from tests.browser.drafts import DATASET, PROMPTS, RUN, unfold, write_draft
from tests.browser.page_texts import list_settings
from tests.browser.serving import Answer, Served, plain_text, python_of, serve_runs
from tests.chromium import open_page, wait_until
from tests.commands import ROOT

SCRIPT = "wan_train_network.py"
RUN_FILE = "run.toml"


def fields_of(text: str, **typed: str) -> dict[str, str]:
    """The fields of the table of a run.toml, with other texts in some."""
    rows = list_rows(text, read_settings(SCRIPT), None)
    fields = {
        name_field(row.key): typed.pop(row.key, row.value) for row in rows if row.setting and row.is_simple
    }
    return {**fields, **typed}


def edit(text: str = RUN, **typed: str) -> list[str]:
    rows = list_rows(text, read_settings(SCRIPT), None)
    return describe_difference(text, apply_edits(text, rows, fields_of(text, **typed)))


def post(served: Served, address: str, **fields: str) -> Answer:
    body = urlencode(fields)
    origin = {"Origin": served.url, "Content_Type": "application/x-www-form-urlencoded"}
    return served.ask(address, "POST", body, **origin)


def send_table(served: Served, folder: Path, what: str, base: str = RUN, **typed: str) -> Answer:
    fields = fields_of(base, **typed)
    fields |= {"folder": str(folder), "part": "table", "base": base, "have": compute_checksum(base.encode())}
    return post(served, f"/new/settings/{what}", **fields, complete="yes")


def test_the_options_are_those_of_the_help() -> None:
    settings = {setting.name: setting for setting in read_settings(SCRIPT)}
    assert len(settings) > 150
    assert settings["network_dim"].kind == "whole"
    assert settings["loss_type"].choices == ["l1", "l2", "huber", "smooth_l1"]
    assert settings["network_args"].is_list
    assert settings["fp8_base"].kind == "switch"
    assert settings["fp8_base"].default == "false"
    assert settings["vae_dtype"].about == settings["vae_dtype"].help.split(". ")[0]
    assert "config_file" not in settings
    assert not [name for name in settings if name in ("deepspeed", "help")]


def test_rows_begin_with_the_keys_of_the_file_and_have_all_options() -> None:
    chosen = RUN.replace("network_dim = 32", "network_dim = 16").replace("sdpa = true", "fp8_base = true")
    settings = read_settings(SCRIPT)
    rows = list_rows(RUN, settings, chosen)
    by_key = {row.key: row for row in rows}
    assert [row.key for row in rows[:3]] == ["dit", "dataset_config", "sdpa"]
    assert {setting.name for setting in settings} <= by_key.keys()
    assert (by_key["network_dim"].value, by_key["network_dim"].proposed) == ("32", "16")
    changed = [row.key for row in rows if row.is_changed]
    assert changed == ["sdpa", "network_dim", "fp8_base"]
    assert by_key["their_key"].setting is None
    assert by_key["their_key"].value == "7"


def test_only_what_was_typed_is_changed() -> None:
    typed = {"learning_rate": "1e-4", "blocks_to_swap": "auto", "network_args": "a=1 'b=x y'", "sdpa": ""}
    assert edit(**typed) == [
        "-sdpa = true",
        "-learning_rate = 0.0002",
        "+learning_rate = 1e-4",
        '+network_args = ["a=1", "b=x y"]',
        '+blocks_to_swap = "auto"',
    ]
    assert edit() == []


def test_a_comment_beside_a_value_stays() -> None:
    assert edit(gradient_checkpointing="false") == [
        "-gradient_checkpointing = true  # half of the memory",
        "+gradient_checkpointing = false  # half of the memory",
    ]


def test_new_keys_go_to_the_end_of_the_training() -> None:
    lines = edit_toml(RUN, {"loss_type": "huber"}).splitlines()
    place = lines.index('loss_type = "huber"')
    assert lines[place - 1 : place + 3] == [
        "their_key = 7",
        'loss_type = "huber"',
        "",
        "# what `run` looks for and runs; the training leaves it alone",
    ]


def test_a_key_is_changed_in_the_table_that_has_it() -> None:
    text = "top = 1\n[training]\na = 1\n[training.more]\nb = 2\n[reelsmith]\nb = 3\n"
    changed = "top = 5\n[training]\na = 1\n[training.more]\nb = 6\n[reelsmith]\nb = 3\n"
    assert edit_toml(text, {"top": 5, "b": 6}) == changed
    assert edit_toml(text, {"b": None}) == text.replace("b = 2\n", "")


def test_texts_of_several_lines_are_left_to_the_text(tmp_path: Path) -> None:
    text = RUN.replace("their_key = 7", 'training_comment = """one\ntwo"""')
    row = next(row for row in list_rows(text, read_settings(SCRIPT), None) if row.key == "training_comment")
    assert not row.is_simple
    assert edit(text, network_dim="8") == ["-network_dim = 32", "+network_dim = 8"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"network_dim": "x"}, "run.toml: network_dim = 'x': expected a whole number"),
        ({"network_dim": "9999"}, "--network_dim 9999: 4096 is the maximum. Usual ranks are 4 to 128."),
        (
            {"loss_type": "hub"},
            "run.toml: loss_type = 'hub': choose from l1, l2, huber, smooth_l1. Did you mean",
        ),
        ({"learning_rate": "0,001"}, "run.toml: learning_rate = '0,001': expected a number"),
        ({"network_args": "'open"}, "network_args: No closing quotation. Quote a value"),
    ],
)
def test_a_wrong_value_is_refused_with_the_message_of_the_script(
    typed: dict[str, str], message: str, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        answer = send_table(served, folder, "save", shown="anything", **typed)
    assert answer.status == 422
    assert message in answer.text.replace("&#39;", "'")
    assert (folder / RUN_FILE).read_text(encoding="utf-8") == RUN


def test_a_button_saves_what_its_form_holds_at_once(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        saved = send_table(served, folder, "save", network_dim="16")
    assert saved.status == 200
    assert "Saved into run.toml: -network_dim = 32; +network_dim = 16" in saved.text
    assert (folder / RUN_FILE).read_text(encoding="utf-8") == RUN.replace(
        "network_dim = 32", "network_dim = 16"
    )


def test_a_warning_of_the_script_is_said_with_what_is_saved(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        assert "is very high" not in send_table(served, folder, "look", network_dim="8").text
        answer = send_table(served, folder, "save", learning_rate="1")
    assert "--learning_rate 1 is very high for AdamW" in html.unescape(answer.text)
    assert "learning_rate = 1" in (folder / "run.toml").read_text(encoding="utf-8")


def test_what_follows_from_the_steps_is_named(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        told = html.unescape(send_table(served, folder, "save", max_train_steps="100").text)
        assert "sample_every_n_steps = 200: derived from the previous number of steps. For 100 steps" in told
        assert "The field Training steps, at the top, changes them together." in told
        saved = (folder / "run.toml").read_text(encoding="utf-8")
        assert "max_train_steps = 100\n" in saved
        both = send_table(
            served,
            folder,
            "look",
            saved,
            max_train_steps="300",
            sample_every_n_steps="30",
            learning_rate="0.001",
        )
        assert "derived from the previous number of steps" not in both.text


def test_nothing_changed_is_said(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        assert "Nothing was changed." in send_table(served, folder, "save").text


def test_a_file_that_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    theirs = RUN.replace("seed = 42", "seed = 43")
    with serve_runs(tmp_path) as served:
        (folder / RUN_FILE).write_text(theirs, encoding="utf-8")
        answer = send_table(served, folder, "save", network_dim="16")
    assert answer.status == 422
    assert (
        "The file now: -seed = 42; +seed = 43. What you changed: -network_dim = 32; +network_dim = 16"
        in answer.text
    )
    assert (folder / RUN_FILE).read_text(encoding="utf-8") == theirs


def test_a_form_that_did_not_arrive_as_a_whole_removes_nothing(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    fields = {"folder": str(folder), "part": "table", "have": compute_checksum(RUN.encode())}
    with serve_runs(tmp_path) as served:
        answer = post(served, "/new/settings/save", **fields)
    assert answer.status == 422
    assert "arrived incomplete" in answer.text


def test_a_fault_that_was_there_before_does_not_hinder(tmp_path: Path) -> None:
    faulty = RUN.replace("their_key = 7", 'loss_type = "hub"')
    folder = write_draft(tmp_path, run=faulty)
    with serve_runs(tmp_path) as served:
        saved = send_table(served, folder, "save", base=faulty, network_dim="16")
    assert saved.status == 200
    assert "network_dim = 16" in (folder / RUN_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "run.toml",
            RUN.replace("seed = 42", "seed = "),
            "run.toml is not valid TOML: Invalid value (at line 11",
        ),
        ("run.toml", "[reelsmith]\n", "the table [training] is missing"),
        ("run.toml", RUN.replace("seed = 42", "seeed = 42\nnetwork_dimm = 3"), "Did you mean network_dim?"),
        ("dataset.toml", DATASET.replace("]\n", "\n", 1), "dataset.toml is not valid TOML"),
        (
            "dataset.toml",
            DATASET.replace("caption_extension", "captoin_extension"),
            "Did you mean caption_extension?",
        ),
        ("prompts.txt", PROMPTS.replace("--w 64", "--w x"), "prompts.txt, line 2"),
    ],
)
def test_a_text_is_checked_as_the_scripts_read_it(name: str, text: str, message: str, tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with pytest.raises((OptionError, ValueError), match=re.escape(message)):
        check_text(name, text, folder, RUN)


@pytest.mark.parametrize(
    ("name", "text"), [("run.toml", RUN), ("dataset.toml", DATASET), ("prompts.txt", PROMPTS)]
)
def test_what_new_writes_is_accepted(name: str, text: str, tmp_path: Path) -> None:
    check_text(name, text, write_draft(tmp_path), RUN)


def test_a_text_keeps_the_ends_of_its_lines(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    content = b"\xef\xbb\xbf" + PROMPTS.replace("\n", "\r\n").encode()
    (folder / "prompts.txt").write_bytes(content)
    fields = {
        "folder": str(folder),
        "part": "prompts.txt",
        "have": compute_checksum(content),
        "base": PROMPTS,
    }
    fields["text"] = PROMPTS.replace("snow", "rain").replace("\n", "\r\n")
    with serve_runs(tmp_path) as served:
        saved = post(served, "/new/settings/save", **fields)
    assert saved.status == 200
    assert (folder / "prompts.txt").read_bytes() == content.replace(b"snow", b"rain")


def test_a_conflict_of_texts_keeps_both(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    fields = {
        "folder": str(folder),
        "part": "prompts.txt",
        "have": compute_checksum(PROMPTS.encode()),
        "base": PROMPTS,
    }
    (folder / "prompts.txt").write_text("a dog\n", encoding="utf-8")
    with serve_runs(tmp_path) as served:
        answer = post(served, "/new/settings/save", **fields, text="a cat\n")
    assert answer.status == 422
    assert "+a dog" in answer.text
    assert "\na cat\n</textarea>" in answer.text
    assert (folder / "prompts.txt").read_text(encoding="utf-8") == "a dog\n"


def test_markup_in_a_file_is_shown_as_text(tmp_path: Path) -> None:
    run = RUN.replace('"fluff"', '"<img src=x onerror=alert(1)>"').replace("their_key", '"<b>"')
    folder = write_draft(tmp_path, run=run)
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/settings?folder={quote(str(folder))}").text
    assert "<img" not in page
    assert "<b>" not in page
    assert "&lt;img src=x" in page


def test_nothing_outside_of_the_roots_is_read_or_written(tmp_path: Path) -> None:
    outside = write_draft(tmp_path / "outside")
    root = tmp_path / "root"
    inside = write_draft(root)
    (inside / "prompts.txt").unlink()
    (inside / "prompts.txt").symlink_to(outside / "prompts.txt")
    with serve_runs(root) as served:
        assert served.ask(f"/new/settings?folder={quote(str(outside))}").status == 404
        assert served.ask(f"/new/settings?folder={quote(f'{inside}/../../outside/clips')}").status == 404
        assert send_table(served, outside, "save", network_dim="1").status == 404
        page = served.ask(f"/new/settings?folder={quote(str(inside))}").text
        assert "falling snow" not in page
        assert "is outside the folders" in page
        fields = {"folder": str(inside), "part": "../prompts.txt", "have": "", "text": "x"}
        assert post(served, "/new/settings/save", **fields).status == 404
    assert (outside / RUN_FILE).read_text(encoding="utf-8") == RUN


def test_a_run_file_that_is_a_link_to_elsewhere_is_not_shown(tmp_path: Path) -> None:
    outside = write_draft(tmp_path / "outside")
    inside = write_draft(tmp_path / "root")
    (inside / RUN_FILE).unlink()
    (inside / RUN_FILE).symlink_to(outside / RUN_FILE)
    with serve_runs(tmp_path / "root") as served:
        for part in ("settings", "memory", "samples"):
            assert served.ask(f"/new/{part}?folder={quote(str(inside))}").status == 404


@pytest.mark.parametrize("script", ["../evil.py", "-c", "tools/download.py", "wan_generate_video.py"])
def test_a_script_that_does_not_train_is_not_asked(script: str, tmp_path: Path) -> None:
    run = RUN.replace('["python", "wan_train_network.py"', f'["python", "{script}"')
    folder = write_draft(tmp_path, run=run)
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/settings?folder={quote(str(folder))}").text
    assert 'name="set ' not in page
    assert 'role="alert"' in page
    assert "their_key = 7" in page  # the text is there to be corrected


def test_only_a_script_that_caches_reads_a_dataset() -> None:
    words = ["python", "wan_cache_latents.py", "--dataset_config", "dataset.toml", "--vae", "vae.safetensors"]
    assert find_caching_argv(RUN) == words
    theirs = RUN.replace('"wan_cache_latents.py"', '"flux_train_network.py", "--output_config"')
    for text, reason in (
        (theirs, "none of its commands does this"),
        ("nothing = 1", "it has no 'reelsmith'"),
    ):
        with pytest.raises(OptionError, match=f"no caching command .* for dataset.toml: {reason}"):
            find_caching_argv(text)
        assert "No script has checked dataset.toml" in check_text("dataset.toml", DATASET, Path.cwd(), text)


def test_read_only_shows_values_without_fields_and_saves_nothing(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path, read_only=True) as served:
        page = served.ask(f"/new/settings?folder={quote(str(folder))}").text
        assert "<button" not in page
        assert 'name="set network_dim"' not in page
        assert "their_key" in page
        assert send_table(served, folder, "save", network_dim="1").status == 403


def test_a_change_for_an_earlier_file_is_refused(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with pytest.raises(ChangedMeanwhileError):
        change_keys(folder / RUN_FILE, {"seed": 1}, compute_checksum(b"earlier"))


def test_what_new_prints_is_found_between_other_lines() -> None:
    assert parse_proposed_run(f"a warning\n{RUN}") == RUN[RUN.index("[training]") : RUN.index("[reelsmith]")]
    assert parse_proposed_run("OptionError: no such folder\n") is None


@contextlib.contextmanager
def open_settings(served: Served, folder: Path, **look: Any) -> Iterator[Any]:
    with open_page(f"{served.url}/new?folder={quote(str(folder))}", **look) as page:
        wait_until(page, "document.querySelector('#row-network_dim') !== null")
        unfold(page, "settings")
        yield page


def wait_for_text(page: Any, place: str, text: str) -> None:
    wait_until(page, f"document.querySelector({place!r})?.textContent.includes({text!r}) === true")


def test_a_save_says_at_once_that_it_works(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served, open_settings(served, folder) as page:
        busy = page.locator("#changes-keys .busy")
        assert not busy.is_visible()
        held: list[Any] = []
        page.route("**/new/settings/save", lambda route: held.append(route))  # answered when it is let go on
        page.locator("#set-network_dim").fill("8")
        page.get_by_role("button", name="Save these changes").click()
        assert busy.is_visible()
        assert busy.inner_text() == "being checked and saved …"
        wait_until(page, "document.querySelector('#keys').matches('.htmx-request')")
        held[0].continue_()
        wait_for_text(page, "#changes-keys", "Saved into run.toml")
        assert not page.locator("#changes-keys .busy").is_visible()


def test_search_opens_the_table_and_finds_names_helps_and_words_of_others(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with (
        serve_runs(tmp_path) as served,
        open_page(f"{served.url}/new?folder={quote(str(folder))}") as page,
    ):
        wait_until(page, "document.querySelector('#row-network_dim') !== null")
        assert not page.locator("#row-network_dim").is_visible()
        page.get_by_label("Look for a setting").fill("host memory blocks")
        assert page.locator("#row-blocks_to_swap").is_visible()
        assert not page.locator("#row-network_dim").is_visible()
        page.get_by_label("Look for a setting").fill("NETWORK_DIM")
        assert page.locator("#row-network_dim").is_visible()
        assert not page.locator("#row-blocks_to_swap").is_visible()
        count = page.locator("#setting-count").inner_text()
        assert int(count.split(" of ")[0]) <= 3  # the helps of a few others name it too
        for word in ("vram", "rank", "dim", "epochs", "precision"):
            page.get_by_label("Look for a setting").fill(word)
            hidden = [
                name
                for name in WORDS[word]
                if page.locator(f"#row-{name}").count() and page.locator(f"#row-{name}").is_hidden()
            ]
            assert (word, hidden) == (word, [])
        page.get_by_label("Look for a setting").fill("resolution")
        row = page.locator("#setting-rows tr:visible", has=page.get_by_text("resolution", exact=True))
        row.get_by_role("link", name="in dataset.toml").click()
        assert page.evaluate("document.activeElement.id") == "text-dataset-text"
        for word in ("batch", "batch size", "train_batch_size"):
            page.get_by_label("Look for a setting").fill(word)
            assert (
                page.locator("#setting-rows tr:visible").first.get_attribute("id") == "row-dataset-batch_size"
            )
        assert page.problems == []


def test_search_finds_english_words_names_and_those_of_the_language(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served, open_settings(served, folder, locale="ja") as page:
        assert "サンプルを作る" in page.locator("#row-sample_every_n_steps").inner_text()
        for word, key in (
            *(("network_dim", "network_dim"), ("rank", "network_dim"), ("ＶＲＡＭ", "blocks_to_swap")),
            *(("ランク", "network_dim"), ("バッチ", "gradient_accumulation_steps")),
            *(("host memory blocks", "blocks_to_swap"), ("ブロックスワップ", "blocks_to_swap")),
            *(("サンプラー", "timestep_sampling"), ("過学習", "network_dropout")),
        ):
            page.locator("[data-find='#setting-rows']").fill(word)
            assert page.locator(f"#row-{key}").is_visible(), word
            assert not page.locator("#row-output_name").is_visible(), word
        assert page.problems == []


def test_words_of_others_stand_for_settings_that_there_are() -> None:
    options = {setting.name for settings in list_settings().values() for setting in settings}
    named = {name for names in WORDS.values() for name in names}
    assert named - options - DATASET_KEYS.keys() == set()
    assert DATASET_KEYS.keys() <= named


def test_the_labels_of_the_form_are_found_once(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served, open_settings(served, folder) as page:
        wait_until(page, "document.querySelector('#sample-form') !== null")
        wait_until(page, "document.querySelector('#memory-form') !== null")
        for label in ("Folder", "Model", "Version", "Trigger word", "Name", "Training steps"):
            assert page.get_by_label(label, exact=True).count() == 1, label


@pytest.mark.slow  # daily: test_a_file_that_changed_meanwhile_is_not_overwritten
def test_two_browsers_lose_nothing(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with (
        serve_runs(tmp_path) as served,
        open_settings(served, folder) as page,
        contextlib.closing(page.context.browser.new_page()) as other,
    ):
        other.goto(page.url)
        wait_until(other, "document.querySelector('#row-network_dim') !== null")
        unfold(other, "settings")
        for browser, key, value in ((page, "network_dim", "16"), (other, "seed", "5")):
            browser.locator(f"#set-{key}").fill(value)
            wait_for_text(browser, "#changes-keys", f"+{key} = {value}")
        page.get_by_role("button", name="Save these changes").click()
        wait_for_text(page, "#changes-keys", "Saved into run.toml")
        other.get_by_role("button", name="Save these changes").click()
        wait_for_text(other, "#changes-keys", "has changed in the meantime")
        assert other.locator("#set-network_dim").input_value() == "16"
        assert other.locator("#set-seed").input_value() == "5"  # typed, and not yet saved
        other.get_by_role("button", name="Save these changes").click()
        wait_for_text(other, "#changes-keys", "Saved into run.toml")
    expected = RUN.replace("network_dim = 32", "network_dim = 16").replace("seed = 42", "seed = 5")
    assert (folder / RUN_FILE).read_text(encoding="utf-8") == expected


@pytest.mark.slow
def test_back_restores_what_new_chose(tmp_path: Path) -> None:
    """`new` makes run.toml again in a process, and writes nothing."""
    models = tmp_path / "models"
    run = RUN.replace('"dit.safe', f'"{models}/dit.safe').replace('"vae.', f'"{models}/vae.')
    run = run.replace('"t5.safe', f'"{models}/t5.safe')
    folder = write_draft(tmp_path / "root", run=run)
    before = {path.name for path in folder.iterdir()}
    with serve_runs(tmp_path / "root", models=models) as served, open_settings(served, folder) as page:
        wait_for_text(page, "#row-network_dim > :last-child", "32")
        assert page.locator("#row-network_dim [data-back]").count() == 0
        assert page.locator("#row-timestep_sampling").inner_text().count("shift") > 1  # chosen, and not there
        page.locator("#set-network_dim").fill("8")
        wait_for_text(page, "#changes-keys", "+network_dim = 8")
        page.get_by_role("button", name="Save these changes").click()
        wait_until(page, "document.querySelector('#row-network_dim [data-back]') !== null")
        assert "network_dim = 8" in (folder / RUN_FILE).read_text(encoding="utf-8")
        page.locator("#row-network_dim").get_by_role("button", name="back").click()
        wait_for_text(page, "#changes-keys", "+network_dim = 32")
        page.get_by_role("button", name="Save these changes").click()
        wait_until(page, "document.querySelector('#row-network_dim [data-back]') === null")
        assert page.problems == []
    assert (folder / RUN_FILE).read_text(encoding="utf-8") == run
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.slow
def test_what_is_typed_stays_while_a_folder_is_described_and_checked(tmp_path: Path) -> None:
    """The parts appear once the folder is described, and a check that is followed does not touch them."""
    files = {name: ROOT / "pocket" / f"{name}.safetensors" for name in ("dit", "vae", "t5")}
    if not all(path.exists() for path in files.values()):
        pytest.skip("the pocket model is not there")
    folder = write_draft(tmp_path)
    for name in FILES:
        (folder / name).unlink()
    with serve_runs(tmp_path) as served:
        words = {"folder": str(folder), "family": "wan", "task": "t2v-1.3B", "trigger": "fluff", "steps": "9"}
        words |= {f"file_{name}": str(path) for name, path in files.items()}
        assert post(served, "/new/describe", **words).status == 200
        with open_settings(served, folder) as page:
            wait_for_text(page, "#row-network_dim > :last-child", "32")
            page.locator("#set-network_dim").fill("8")
            page.locator("#set-loss_type").select_option("huber")
            wait_until(page, "document.querySelector('#sample-form') !== null")
            page.get_by_label("Sample 1 prompt").fill("a dog")
            wait_for_text(page, "#changes-samples", "+a dog")
            check = page.get_by_role("button", name="Check", exact=True)
            check.click()
            page.get_by_text("press the button once more to go on without it").wait_for()
            check.click()
            wait_for_text(page, "#changes-samples", "+a dog")
            wait_for_text(page, "#changes-keys", "+network_dim = 8")
            wait_until(page, "/checking|fault/.test(document.querySelector('#progress').textContent)")
            page.wait_for_timeout(2500)  # the state is read again each second
            assert page.locator("#set-network_dim").input_value() == "8"
            assert page.locator("#set-loss_type").input_value() == "huber"
            assert page.get_by_label("Sample 1 prompt").input_value() == "a dog"
            unfold(page, "memory")
            page.get_by_label("Blocks swapped").fill("3")
            page.get_by_label("Blocks swapped").press("Tab")
            # another part has written the file: the table follows, and keeps what was typed
            wait_until(page, "document.querySelector('#set-blocks_to_swap').value === '3'")
            assert page.locator("#set-network_dim").input_value() == "8"
            assert page.locator("#set-loss_type").input_value() == "huber"
            assert page.locator("#row-blocks_to_swap").inner_text().count("changed") == 1
            # the file that `new` has written is what it chose: nothing is computed for it
            assert list(tmp_path.rglob("chosen-*.json")) == []
            assert page.problems == []


# --- what acts in a run

SUBSETS = """\
[general]
resolution = [64, 64]
shuffle_caption = false

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "."
"""
VALUES = {  # that are not the defaults, by the type of the default
    bool: True,
    int: 3,
    float: 0.25,
}
TYPED = {
    "max_bucket_reso": 2048,
    "resolution": "96",
    "face_crop_aug_range": "2.0,4.0",
    "resize_interpolation": "area",
}


@pytest.mark.parametrize("form", [DATASET, SUBSETS])
def test_settings_that_a_run_ignores_say_so(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run itself says which options its dataset ignores; the page says it of the same ones."""
    (tmp_path / "dataset.toml").write_text(form, encoding="utf-8")
    keys = DatasetKeys.from_text(form)
    wrong = []
    compared = 0
    for option in dataclasses.fields(SubsetOptions):
        name = option_name(option)
        default = get_field_default(SubsetOptions, option)
        value = TYPED.get(name, VALUES.get(type(default), ";"))
        caplog.clear()
        if name in ("train_data_dir", "reg_data_dir", "in_json", "dataset_repeats", "conditioning_data_dir"):
            continue  # for runs without a dataset.toml
        with contextlib.suppress(DatasetError):
            load_dataset_config(
                tmp_path / "dataset.toml", SubsetOptions.from_defaults(**{option.name: value})
            )
        is_ignored = f"--{name}" in caplog.text
        compared += is_ignored
        if is_ignored != bool(keys.explain_unused(name)) and name not in ("masked_loss", "debug_dataset"):
            wrong.append(name)
    assert wrong == []
    assert compared == (29 if form is DATASET else 3)


@pytest.mark.parametrize("form", [DATASET, SUBSETS])
def test_the_pictures_of_a_step_are_written_where_they_act(form: str, tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    (folder / "dataset.toml").write_text(form, encoding="utf-8")
    before = {"dataset batch_size before": DatasetKeys.from_text(form).read_batch_size({})}
    before["have_dataset"] = compute_checksum(form.encode())
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/settings?folder={quote(str(folder))}").text
        assert page.index('id="row-dataset-batch_size"') < page.index('id="row-dit"')
        assert page.count("batch_size goes into <code>dataset.toml</code>") == 1  # at the button of the table
        answer = send_table(served, folder, "save", **{"dataset batch_size": "4"}, **before)
        assert "batch_size = 4" in html.unescape(answer.text)
        assert answer.status == 200
        again = send_table(served, folder, "save", **{"dataset batch_size": "5"}, **before)
        assert again.status == 422  # the file has changed in the meantime
        wrong = send_table(served, folder, "save", **{"dataset batch_size": "four"}, **before)
        assert "Images of a step four: use a whole number" in html.unescape(wrong.text)
    config = load_dataset_config(folder / "dataset.toml")
    assert {table.learning.batch_size for table in config.datasets} == {4}


def test_a_batch_size_of_the_training_moves_into_the_dataset(tmp_path: Path) -> None:
    run = RUN.replace("seed = 42", "seed = 42\ntrain_batch_size = 2")
    form = SUBSETS.replace("batch_size = 2\n", "")
    folder = write_draft(tmp_path, run)
    (folder / "dataset.toml").write_text(form, encoding="utf-8")
    keys = DatasetKeys.from_text(form)
    assert keys.read_batch_size(read_keys(run)) == "2"
    assert keys.explain_unused("train_batch_size") == ""
    typed = {"dataset batch_size": "3", "dataset batch_size before": "2"}
    with serve_runs(tmp_path) as served:
        fields = {"train_batch_size": "2", "have_dataset": compute_checksum(form.encode())}
        answer = send_table(served, folder, "save", run, **typed, **fields)
    assert answer.status == 200
    assert "train_batch_size" not in (folder / "run.toml").read_text(encoding="utf-8")
    assert load_dataset_config(folder / "dataset.toml").datasets[0].learning.batch_size == 3


def test_an_option_without_effect_is_said_where_it_is_typed(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        plain = send_table(served, folder, "look", network_dim="8").text
        assert "no effect:" not in plain.split('id="setting-rows"')[0]
        told = html.unescape(send_table(served, folder, "look", lr_scheduler_power="2").text)
    assert "--lr_scheduler_power has no effect: " in told


# --- each kind of run

SCRIPTS = [
    script
    if kind.uses_control_images or kind.trains_embedding
    else pytest.param(script, marks=pytest.mark.slow)
    for script, kind in kinds_by_script().items()
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_and_memory_open_for_all_that_can_be_trained(script: str, tmp_path: Path) -> None:
    folder = write_draft(tmp_path, RUN.replace(SCRIPT, script))
    with serve_runs(tmp_path) as served:
        settings = served.ask(f"/new/settings?folder={quote(str(folder))}")
        assert settings.status == 200
        assert 'id="row-learning_rate"' in settings.text
        assert f"{script} does not train" not in settings.text
        memory = served.ask(f"/new/memory?folder={quote(str(folder))}")
        assert memory.status == 200
        assert f"{python_of(script)} --config_file run.toml --plan" in plain_text(memory.text)


@pytest.mark.parametrize(
    ("lines", "idle"),
    [
        (
            "",
            {
                "lr_warmup_steps",
                "lr_scheduler_power",
                "lr_scheduler_num_cycles",
                "save_last_n_steps",
                "huber_c",
            },
        ),
        ('lr_scheduler = "cosine_with_restarts"', {"lr_scheduler_power", "save_last_n_steps", "huber_c"}),
        (
            "save_every_n_steps = 5",
            {"lr_warmup_steps", "lr_scheduler_power", "lr_scheduler_num_cycles", "huber_c"},
        ),
        (
            'loss_type = "huber"\nhuber_c = 0.2',
            {"lr_warmup_steps", "lr_scheduler_power", "save_last_n_steps"},
        ),
    ],
)
def test_settings_that_the_other_settings_leave_idle_say_so(lines: str, idle: set[str]) -> None:
    looked_at = (
        *("lr_warmup_steps", "lr_scheduler_power", "lr_scheduler_num_cycles", "save_last_n_steps"),
        *("huber_c", "learning_rate", "network_dim", "lr_scheduler"),
    )
    rows = list_rows(f"[training]\n{lines}\n", list_settings()["wan_train_network.py"], None)
    found = {row.key for row in rows if row.idle_reason}
    assert found & {*looked_at} == idle | ({"lr_scheduler_num_cycles"} if "huber" in lines else set())
    assert [bool(row.idle_reason) for row in rows] == sorted(bool(row.idle_reason) for row in rows)


@pytest.mark.parametrize(
    ("locale", "searches"),
    [
        (
            "en",
            {
                "batch": "dataset-batch_size",
                "learning rate": "learning_rate",
                "lr": "learning_rate",
                "rank": "network_dim",
                "dim": "network_dim",
                "epochs": "max_train_epochs",
                "LoRA strength": "network_alpha",
                "overfit": "network_dropout",
                "low vram": "blocks_to_swap",
                "sampling": "sample_every_n_steps",
                "seed": "seed",
                "save": "save_every_n_steps",
            },
        ),
        (
            "zh",
            {"批量": "dataset-batch_size", "学习率": "learning_rate", "显存": "blocks_to_swap", "采样": None},
        ),
        (
            "ja",
            {"バッチ": "dataset-batch_size", "学習率": "learning_rate", "解像度": None, "サンプリング": None},
        ),
    ],
)
def test_the_setting_that_acts_comes_first_and_idle_ones_are_not_offered(
    locale: str, searches: dict[str, str | None], tmp_path: Path
) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served, open_settings(served, folder, locale=locale) as page:
        found = {}
        for word in searches:
            page.locator("[data-find='#setting-rows']").fill(word)
            found[word] = page.locator("#setting-rows tr:visible").first.get_attribute("id")
            assert page.locator("#setting-rows tr[data-idle]:visible").count() == 0
        expected = {word: key and f"row-{key}" for word, key in searches.items()}
        assert {word: found[word] for word, key in searches.items() if key} == {
            word: key for word, key in expected.items() if key
        }
        page.locator("[data-find='#setting-rows']").fill("lr_warmup_steps")
        assert page.locator("#row-lr_warmup_steps").is_visible()  # by its name, with the reason
        page.locator("[data-find='#setting-rows']").fill("")
        places = page.eval_on_selector_all(
            "#setting-rows tr", "rows => rows.map((row) => +row.dataset.place)"
        )
        assert places == sorted(places)
        assert page.problems == []
