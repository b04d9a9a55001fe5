"""Pages call models by their names for people: those for programs stand in commands and files alone."""

import re
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

import pytest

from downloads.catalogue import families, model_sets, model_title
from protocols.families import FAMILIES, with_scripts
from tests.browser.serving import Served, serve_runs, write_run
from tests.browser.test_results import write_result

# commands, texts to copy, and names of files may hold any name
UNSEEN = re.compile(r"<(script|style|code|pre|template|title)\b.*?</\1>|<[^>]*>", re.DOTALL)
FILE_NAME = re.compile(r"\S+\.(safetensors|pth|bin|json|toml|model|gguf|ckpt|pkl)\b|\S*/\S*")


def list_inner_names() -> list[str]:
    """Return the names for programs that nobody would type: with an underscore or a version in them."""
    further = [name for entry in with_scripts().values() for name in entry.further_models]
    names = {*FAMILIES, *families(), *further}
    return sorted(name for name in names if "_" in name or re.search(r"[a-z]\d", name))


def find_inner_names(html: str) -> list[str]:
    """Return the names for programs in the visible text of a page."""
    text = FILE_NAME.sub(" ", unescape(UNSEEN.sub(" ", html)))
    return [name for name in list_inner_names() if re.search(rf"(?<![\w.-]){name}(?![\w.-])", text)]


@pytest.fixture
def served(tmp_path: Path) -> Served:
    for name, model in (("a", "flux_3"), ("b", "sdxl"), ("c", "hunyuan_video"), ("d", "qwen_image_edit")):
        write_run(tmp_path / name, name, 4, "good", model=model)
    write_result(tmp_path / "generated" / "x.png")
    with serve_runs(tmp_path, models=tmp_path / "models") as served:
        yield served


def test_every_model_has_a_name_for_people() -> None:
    further = [name for entry in with_scripts().values() for name in entry.further_models]
    for name in (*with_scripts(), *families(), *further):
        assert model_title(name) != name
    titles = [model.title for model in model_sets()]
    assert len(set(titles)) == len(titles)
    assert not [title for title in titles if "_" in title]


@pytest.mark.parametrize(
    ("name", "task", "title"),
    [
        ("wan", "t2v-A14B", "Wan2.2 t2v-A14B"),
        ("wan", "", "Wan"),
        ("flux_3", "", "FLUX 3 Klein"),
        ("stable_diffusion", "xl", "Stable Diffusion XL"),
        ("sdxl", "", "Stable Diffusion XL"),
        ("somebody's", "own", "somebody's own"),
    ],
)
def test_a_model_is_called_as_people_know_it(name: str, task: str, title: str) -> None:
    assert model_title(name, task) == title


def test_no_page_shows_a_name_for_programs(served: Served) -> None:
    run = served.of("a")
    chosen = urlencode({"family": "stable_diffusion", "task": "xl"})
    places = [
        "/",
        "/?view=table",
        run,
        "/queue",
        f"/compare?run={run.split('/')[2]}",
        "/datasets",
        "/settings",
    ]
    places += ["/models", f"/models?{chosen}", "/new", f"/new?{chosen}", "/generate"]
    places += [f"/generate?{urlencode({'source': 'model z_image turbo'})}", "/results/part?from=0&count=5"]
    found = {}
    for place in places:
        answer = served.ask(place)
        assert answer.status == 200, place
        found[place] = find_inner_names(answer.text)
    assert found == dict.fromkeys(places, [])
    listed = served.ask("/").text
    for title in ("FLUX 3 Klein", "Stable Diffusion XL", "HunyuanVideo", "Qwen-Image-Edit"):
        assert f"· {title}" in listed
    assert "<td>Transformer <" in served.ask("/models?family=wan&task=t2v-1.3B").text


def test_a_name_for_programs_would_be_found() -> None:
    assert find_inner_names("<td>a <b>flux_3</b>, wan22 t2v</td>") == ["flux_3", "wan22"]
    assert (
        find_inner_names("<td data-family='flux_3'><code>--family wan22</code> flux_3.safetensors</td>") == []
    )


def list_choices(page: str) -> list[str]:
    """Return the models that the filter of the list of runs offers."""
    (choice,) = re.findall(r'<select name="family">.*?</select>', page)
    return re.findall(r">([^<]+)</option>", choice)[1:]


def test_families_of_a_list_are_sorted_by_their_titles(served: Served) -> None:
    titles = list_choices(served.ask("/").text)
    assert titles == ["FLUX 3 Klein", "HunyuanVideo", "Qwen-Image-Edit", "Stable Diffusion XL"]


def test_one_model_with_two_names_for_programs_is_one_choice_of_the_filter(tmp_path: Path) -> None:
    assert model_title("ltx_2") == model_title("ltx2_v1") == "LTX-2"
    for name, model in (("new", "ltx_2"), ("old", "ltx2_v1"), ("other", "wan")):
        write_run(tmp_path / name, name, 4, "good", model=model)
    with serve_runs(tmp_path) as served:
        every = served.ask("/").text
        asked = [
            served.ask(f"/?{urlencode({'family': family})}").text for family in ("LTX-2", "ltx_2", "wan")
        ]

    assert list_choices(every) == ["LTX-2", "Wan"]
    listed = [{name for name in ("new", "old", "other") if f">{name}<" in text} for text in asked]
    assert listed == [{"new", "old"}, {"new", "old"}, {"other"}]
