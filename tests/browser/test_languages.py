"""The page in each language: which one is chosen, that no text is left out, and that nothing else changes."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from jinja2 import nodes

from browser.core import language_tables
from browser.core.language_tables import CODES, NAMES, read_table, read_texts
from browser.core.page_language import find_accepted, find_return_address
from downloads.catalogue import model_sets
from modules.pages.language import Language, TranslatableText, join, say, say_count, show_all, speaking
from project.recipes.reading import list_shipped
from tests.browser.page_texts import (
    PLACE,
    PROGRAMS,
    TEMPLATES,
    list_all_script_texts,
    list_helps,
    list_settings,
    list_texts,
    list_value_errors,
    parse_template,
)
from tests.browser.serving import Served, serve_runs, write_run
from tests.browser.test_safe_clicks import describe, save_image
from tests.chromium import open_page

TABLES = CODES[1:]
TAG = re.compile(r"<(/?\w+)")


# ---- the tables


@pytest.mark.parametrize("code", TABLES)
def test_each_text_of_the_page_stands_in_the_table_once(code: str) -> None:
    sections = read_table(code)
    keys = [key for section in sections.values() for key in section]

    assert len(keys) == len({*keys})
    assert {*keys} == {*list_texts()} | list_all_script_texts()
    assert {*sections[language_tables.SCRIPTS]} == list_all_script_texts()
    assert {*sections[language_tables.HELPS]} == {*list_helps()}
    assert all(text for section in sections.values() for text in section.values())


@pytest.mark.parametrize("code", TABLES)
def test_a_translation_has_the_values_and_the_tags_of_its_text(code: str) -> None:
    for key, text in read_texts(code).items():
        assert {*PLACE.findall(key)} == {*PLACE.findall(text)}, key
        assert sorted(TAG.findall(key)) == sorted(TAG.findall(text)), key
        if "<" not in key and key not in list_helps():  # texts of attributes
            assert '"' not in text.replace(' = "%(prompts_file)s"', ""), key
        if PLACE.search(text) and key not in read_table(code)[language_tables.SCRIPTS]:
            assert text % dict.fromkeys(PLACE.findall(text), "1"), key  # with %% for a sign


# options, and names with underscores such as values, fields and files
IN_A_HELP = re.compile(r"--\w+|\w*[A-Za-z]_\w+|\d+(?:\.\d+)?", re.ASCII)


@pytest.mark.parametrize("code", TABLES)
def test_a_translated_help_names_the_options_values_and_numbers_of_its_text(code: str) -> None:
    for key, text in read_table(code)[language_tables.HELPS].items():
        assert {*IN_A_HELP.findall(key)} <= {*IN_A_HELP.findall(text)}, key
        assert {*re.findall(r"--\w+", key)} == {*re.findall(r"--\w+", text, re.ASCII)}, key


def test_helps_of_every_family_are_known() -> None:
    names = {setting.name for setting in list_settings()["wan_train_network.py"]}

    assert {"blocks_to_swap", "network_dim", "dit_high_noise"} <= names
    assert len(list_settings()) > 30


def test_a_text_gets_the_values_that_it_names() -> None:
    assert [error for path in PROGRAMS for error in list_value_errors(path)] == []


def test_templates_hold_no_text_outside_of_the_table() -> None:
    assert {path.name: found for path in TEMPLATES if (found := list_bare_texts(path))} == {}


# names, commands and units, which are the same in every language
SAME_EVERYWHERE = {
    "GB",
    "GiB",
    "Esc",
    "FILE",
    "logs",
    "SHA",
    "mrsfluff",
    "run.toml",
    "dataset.toml",
    "prompts.txt",
}
READ_ATTRIBUTES = {"aria-label", "title", "placeholder", "alt", "data-confirm", "data-label", "label"}


class BareTexts(HTMLParser):
    """Collect what a reader would see of HTML: texts outside of code, and the attributes that are read."""

    inside_of = ("code", "pre", "script", "style", "title", "textarea")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.inside_of:
            self.inside.append(tag)
        self.found += [value for name, value in attrs if name in READ_ATTRIBUTES and value]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            self.inside.remove(tag)

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.found.append(data)


def list_bare_texts(path: Path) -> list[str]:
    """Return the words of a template that are in no call of `_` or `say_count`, and reach the reader."""
    text = path.read_text(encoding="utf-8")
    if path.parent.name == "reports":  # the page of a training alone is in English
        text = re.sub(r"\{% if not live %\}[^{]*\{% endif %\}", "", text)
        text = re.sub(r"\{% if not live %\} · written \{\{ written \}\}\{% endif %\}", "", text)
        text = re.sub(r"\{% else %\}The loss of a single step.*?\{% endif %\}", "", text)
    parser = BareTexts()
    parser.feed(re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "", text, flags=re.DOTALL))
    words = {word for one in parser.found for word in re.findall(r"[A-Za-z][\w.]+", one)}
    return sorted((words | {*list_bare_constants(path)}) - SAME_EVERYWHERE)


def list_bare_constants(path: Path) -> Iterator[str]:
    """Yield the texts with words that a template shows from its own expressions."""
    tree = parse_template(path)
    for output in tree.find_all(nodes.Output):
        for node in output.nodes:
            for one in list_shown_constants(node):
                if " " in one.strip() and not re.search(r"class=|hx-|%\.|^--", one):
                    yield one


def list_shown_constants(node: nodes.Node) -> Iterator[str]:
    match node:
        case nodes.Const(value=str(text)):
            yield text
        case nodes.CondExpr():
            yield from list_shown_constants(node.expr1)
            if node.expr2 is not None:
                yield from list_shown_constants(node.expr2)
        case nodes.Or() | nodes.Add() | nodes.Concat():
            for child in node.iter_child_nodes():
                yield from list_shown_constants(child)
        case nodes.Getitem():
            if isinstance(node.node, nodes.Dict):
                for pair in node.node.items:
                    yield from list_shown_constants(pair.value)


# ---- which language


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("ja", "ja"),
        ("JA-jp;q=0.5, en;q=0.4", "ja"),
        ("de, fr;q=0.9", "en"),
        ("en;q=0.5,ja;q=0.7,zh;q=0.7", "ja"),
        ("zh;q=0, ja;q=0.1", "ja"),
        ("zh;q=nan, ja;q=x", "en"),
        ("zh;q=2, ;;;,=, ja;q=0.3", "ja"),
        ("*", "en"),
    ],
)
def test_the_browser_chooses_the_language(header: str, code: str) -> None:
    assert find_accepted(header) == code


@pytest.mark.parametrize(
    ("address", "back"),
    [
        ("/run/0a/?from=1", "/run/0a/?from=1"),
        ("/new?folder=%2Ftmp%2Fa%20b", "/new?folder=%2Ftmp%2Fa%20b"),
        ("//elsewhere.example/", "/"),
        ("https://elsewhere.example/", "/"),
        ("/\\elsewhere.example", "/"),
        ("/a\r\nset-cookie: x=1", "/"),
        ("/language/ja", "/"),
        ("", "/"),
    ],
)
def test_a_change_of_the_language_leads_back_to_a_page_of_this_server(address: str, back: str) -> None:
    assert find_return_address(address) == back


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("languages")
    generate = "python wan_generate_video.py --lora_weight runs/x.safetensors --prompt 'a <b>cat'"
    prompts = [["sample_prompts", str(root / "prompts.txt")]]
    path = write_run(root / "runs", "x", 10, changed=prompts, working_folder=str(root))
    with path.open("a", encoding="utf-8") as file:
        row = {"step": 10, "commands": [["Generate with it", generate, generate, "", ""]]}
        file.write(json.dumps(row) + "\n")
    (root / "prompts.txt").write_text("a <b>cat --w 65 --n a <b>cat\n", encoding="utf-8")
    died = write_run(root / "output", "mrsfluff", 10, None)
    reason = f"{root}/x.safetensors cannot be written: the disk is full. No partial file was kept. Free some "
    reason += "space or choose another folder, and run again."
    with died.open("a", encoding="utf-8") as file:
        row = {"step": 10, "ended": f"ended by an error after step 10: {reason}", "kind": "bad"}
        file.write(json.dumps(row) + "\n")
    save_image(root / "described" / "0.png")
    describe(root / "described")
    with serve_runs(root) as server:
        yield server


def test_a_page_says_its_language_and_no_cache_gives_it_to_another_reader(served: Served) -> None:
    english, japanese = served.ask("/"), served.ask("/", Accept_Language="ja")

    assert '<html lang="en">' in english.text
    assert '<html lang="ja">' in japanese.text
    assert "<title>学習</title>" in japanese.text
    for answer, code in ((english, "en"), (japanese, "ja")):
        assert answer.headers["content-language"] == code
        assert answer.headers["vary"] == "Accept-Language, Cookie, Reelsmith-Language"
    assert english.headers["etag"] != japanese.headers["etag"]
    known = english.headers["etag"]
    assert served.ask("/", If_None_Match=known).status == 304
    assert served.ask("/", If_None_Match=known, Accept_Language="ja").status == 200


def test_the_link_of_a_language_keeps_it_in_a_cookie_and_leads_back(served: Served) -> None:
    page = served.ask("/queue")
    [link] = {*re.findall(r'href="(/language/zh\?[^"]*)"', page.text)}  # on a phone it is in the menu
    answer = served.ask(link.replace("&amp;", "&"))

    assert answer.status == 303
    assert answer.headers["location"] == "/queue"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    kept = cookie.partition(";")[0]
    assert '<html lang="zh">' in served.ask("/queue", Cookie=kept, Accept_Language="ja").text
    assert '<html lang="ja">' in served.ask("/queue", Accept_Language="ja").text
    assert served.ask("/language/xx").status == 404


def test_what_a_page_asks_for_again_stays_in_its_language(served: Served) -> None:
    with open_page(f"{served.url}/settings") as page:
        kept = served.ask("/language/zh?to=/").headers["set-cookie"].partition(";")[0].partition("=")
        page.context.add_cookies([{"name": kept[0], "value": kept[2], "url": served.url}])
        part = "fetch('/').then((answer) => answer.text()).then((text) => text.match(/lang=.(..)/)[1])"
        assert page.evaluate(part) == "en"
        page.reload()
        assert page.evaluate(part) == "zh"
        assert page.evaluate("document.documentElement.lang") == "zh"
        page.context.clear_cookies()


def test_each_language_has_a_link_in_its_own_words(served: Served) -> None:
    for code in CODES:
        text = served.ask("/settings", Accept_Language=code).text
        for other, name in NAMES:
            assert (f'hreflang="{other}">{name}</a>' in text) == (other != code)


def test_answers_of_buttons_and_json_are_in_the_language(served: Served) -> None:
    run, texts = served.of("x"), read_texts("zh")
    stopped = served.ask(f"{run}do/stop", "POST", Accept_Language="zh", Origin=served.url)
    news = json.loads(served.ask(f"{run}news", Accept_Language="zh").text)
    missing = served.ask("/run/none/news", Accept_Language="zh")

    assert texts["It is not running: it is %(text)s."].partition("%")[0] in stopped.text
    assert texts["Step"] in [tile[0] for tile in news["tiles"]]
    assert missing.text == texts["It does not exist."]


# ---- texts that programs make


def test_a_text_is_english_for_programs_and_translated_where_it_is_shown() -> None:
    text = say("position %(place)s in the queue", place=2)
    both = join(", ", (say("waiting"), text))
    count = say_count(1, "%(n)s image", "%(n)s images")

    assert (text, both, count) == ("position 2 in the queue", "waiting, position 2 in the queue", "1 image")
    assert json.loads(json.dumps([text])) == ["position 2 in the queue"]
    with speaking(Language("ja", read_texts("ja"))):
        assert text.translated() == "キューの 2 番目"
        assert both.translated() == "待機中, キューの 2 番目"
        assert count.translated() == "画像 1 枚"
        assert show_all({"a": [text]}) == {"a": ["キューの 2 番目"]}
        assert isinstance(str(ValueError(text)), TranslatableText)
        assert say("no such text").translated() == "no such text"
    assert text.translated() == "position 2 in the queue"


def test_values_of_a_text_are_escaped_in_every_language(served: Served) -> None:
    with speaking(Language("zh", read_texts("zh"))):
        assert say("%(name)s is empty", name="<b>").__html__() == "&lt;b&gt; 是空的"


# ---- every page, with each text of the table in marks


class Marked(dict[str, str]):
    """Stand for a table that has a translation of every text: the text itself, between marks."""

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: str | None = None) -> str:  # type: ignore[override]
        return f"⟦{key}⟧"


PAGES = (
    *("/", "/?view=table", "/new", "/new?folder={}", "/generate", "/generate?source=model+wan+t2v-1.3B"),
    *(
        "/models",
        "/models?family=wan&task=t2v-1.3B",
        "/queue",
        "/settings",
        "/datasets",
        "/compare",
        "/machine",
    ),
    *(
        "/new/samples?folder={}",
        "/new/memory?folder={}",
        "/new/tags?folder={}",
        "/new/regularization?folder={}",
        "/masks?folder={}",
        "{run}",
        "{run}deeds",
        "{run}panel/prompts",
        "{run}panel/remove",
        "{died}",
        "{died}deeds",
        "/compare?run={id}",
    ),
)
# what no language changes: names of models and licenses, of files, folders and options, people's own words
MODEL_NAMES = {
    *(name for one in model_sets() for name in (one.title, one.family_title, one.task)),
    *(file.licence.name for one in model_sets() for part in one.components for file in part.files),
    *(str(part.path) for one in model_sets() for part in one.components),
    *("Wan", "best"),
    *(recipe.name for recipe in list_shipped()),
}
DATA_NAMES = re.compile(
    r"(?<!\w)(mrsfluff|described|languages\d*|output|runs|models|a <b>cat|warning|the disk is nearly full"
    r"|\d+ bytes|reelsmith run my_clips|FOLDER|DIR|N)(?!\w|\.s|-h)"
    r"|--\w+( [A-Z]+\b)?|\S*/\S*|\S+\.(toml|txt|png|safetensors|jsonl)|, or (?=--)"
)


def test_every_page_shows_no_words_outside_of_the_table(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "⟦the folder where the page was started⟧"
    here.mkdir()
    monkeypatch.chdir(here)
    marked = Language("en", Marked(), "/", NAMES)
    monkeypatch.setattr("browser.core.server.choose_language", lambda request: marked)
    folder = quote(str(served.runs.root_folders[0] / "described"))
    found = {}
    for page in PAGES:
        run = served.of("x")
        address = page.replace("{}", folder).replace("{run}", run).replace("{died}", served.of("mrsfluff"))
        address = address.replace("{id}", run.split("/")[2])
        answer = served.ask(address)
        assert answer.status == 200, address
        words = list_unmarked(answer.text)
        if words:
            found[page] = words
    assert found == {}


def test_the_table_of_settings_shows_no_words_outside_of_the_table(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = Language("en", Marked(), "/", NAMES)
    monkeypatch.setattr("browser.core.server.choose_language", lambda request: marked)
    answer = served.ask(f"/new/settings?folder={quote(str(served.runs.root_folders[0] / 'described'))}")

    settings = list_settings()["wan_train_network.py"]
    assert all(f'id="row-{setting.name}"' in answer.text for setting in settings)
    assert "⟦no file is enlarged⟧" in answer.text
    # values are the same in every language
    text = re.sub(r"<select.*?</select>| placeholder=\"[^\"]*\"", "", answer.text, flags=re.DOTALL)
    assert list_unmarked(text) == []


def list_unmarked(text: str) -> list[str]:
    """Return the words of a page that are in no marks, no code, and are no names."""
    parser = BareTexts()
    parser.feed(text)
    shown = "\n".join(parser.found)
    while shown != (inner := re.sub(r"⟦[^⟦⟧]*⟧", "", shown)):
        shown = inner
    shown = DATA_NAMES.sub("", shown)  # before the names of models, some of which are words such as full
    for name in sorted(MODEL_NAMES, key=len, reverse=True):
        shown = shown.replace(name, "")
    lines = shown.split("\n")
    return sorted({line.strip() for line in lines if re.search(r"[a-z]{3}", line)})


# buttons of which a part is beyond the window, or a word beyond the button
CLIPPED = """[...document.querySelectorAll('button, .button, summary')].filter(one => one.checkVisibility())
  .filter(one => {
    const box = one.getBoundingClientRect(), texts = document.createTreeWalker(one, NodeFilter.SHOW_TEXT);
    const range = document.createRange();
    let isOutside = box.left < 0 || box.right > innerWidth;
    while (texts.nextNode()) {
      range.selectNodeContents(texts.currentNode);
      const words = range.getBoundingClientRect();
      isOutside ||= words.right > box.right + 1 || words.left < box.left - 1 || words.bottom > box.bottom + 1;
    }
    return isOutside;
  }).map(one => one.outerHTML)"""
NARROW = """{
  const one = document.createElement('button');
  one.textContent = 'a text that does not fit';
  one.style = 'width: 3rem; height: 2rem; white-space: nowrap; overflow: hidden';
  document.body.prepend(one);
}"""


@pytest.mark.parametrize("code", TABLES)
def test_no_button_is_clipped_on_a_phone_or_a_desk(served: Served, code: str) -> None:
    folder = quote(str(served.runs.root_folders[0] / "described"))
    addresses = (f"/new?folder={folder}", "/generate?source=model+wan+t2v-1.3B", served.of("x"))
    clipped = {}
    with open_page(served.url, locale=code) as page:
        for address in addresses:
            page.goto(f"{served.url}{address}")
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.lang") == code
            for width in (390, 1440):
                page.set_viewport_size({"width": width, "height": 900})
                clipped[address, width] = page.evaluate(CLIPPED)
            page.evaluate(NARROW)
            assert len(page.evaluate(CLIPPED)) == 1
    assert {place: found for place, found in clipped.items() if found} == {}
