"""What a module of the checkout looks like in the installed package."""

import pytest

from package.rewriting import add_entry_point, find_own_imports, rename_scripts, rewrite_imports

OURS = {"modules", "wan", "families", "package"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from modules.errors import UserError", "from reelsmith.modules.errors import UserError"),
        ("from modules import errors", "from reelsmith.modules import errors"),
        ("from families import identify", "from reelsmith.families import identify"),
        ("from package.reelsmith.commands import main", "from reelsmith.commands import main"),
        ("import modules.interpreter", "import reelsmith.modules.interpreter"),
        ("import os, wan.vae as vae", "import os, reelsmith.wan.vae as vae"),
        ("def f():\n    from  wan.vae import Vae", "def f():\n    from  reelsmith.wan.vae import Vae"),
        ("x = 'ä'; from wan import vae", "x = 'ä'; from reelsmith.wan import vae"),
        ("from wan.vae import (\n    A,\n    B,\n)", "from reelsmith.wan.vae import (\n    A,\n    B,\n)"),
        ("import os\nfrom wanted import x", "import os\nfrom wanted import x"),
        ("from . import wan", "from . import wan"),
        ("modules = wan = 1  # from wan import vae", "modules = wan = 1  # from wan import vae"),
        ("'from wan import vae'", "'from wan import vae'"),
    ],
)  # fmt: skip
def test_absolute_imports_of_ours_get_the_prefix_and_nothing_else_changes(before: str, after: str) -> None:
    assert rewrite_imports(before, OURS) == after


def test_what_was_rewritten_has_no_import_of_the_checkout_left() -> None:
    source = "import modules.interpreter\nfrom wan import vae\n"
    assert find_own_imports(source, OURS) == ["modules.interpreter", "wan"]
    assert find_own_imports(rewrite_imports(source, OURS), OURS) == []


def test_an_import_whose_name_would_change_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1: `import wan.vae` binds wan"):
        rewrite_imports("import wan.vae\nwan.vae.load()", OURS)


def test_texts_name_console_commands() -> None:
    scripts = {"cache_latents", "wan_cache_latents"}
    text = 'f("wan_cache_latents.py", x)  # python cache_latents.py, my_cache_latents.py, or wan.py'
    renamed = 'f("wan_cache_latents", x)  # cache_latents, my_cache_latents.py, or wan.py'
    assert rename_scripts(text, scripts) == renamed
    assert rename_scripts("python blissful_tuner/metaview.py --help", {"metaview"}) == "metaview --help"
    launch = "accelerate launch --cpu {}cache_latents --x"
    assert rename_scripts(launch.format("").replace("s --x", "s.py --x"), scripts) == launch.format(
        "-m reelsmith."
    )


def test_a_script_gets_an_entry_point_that_does_what_it_does_as_a_program() -> None:
    script = 'def main(): ...\n\n\nif __name__ == "__main__":\n    command_line(main, explain=identify)\n'
    done = add_entry_point(script, "merge_lora")
    assert "def run() -> None:" in done
    assert done.count("    command_line(main, explain=identify)\n") == 1
    assert done.endswith('    sys.argv[0] = "merge_lora"\n    run()\n')
    with pytest.raises(ValueError, match=r"merge_lora\.py does not end with"):
        add_entry_point("def main(): ...\n", "merge_lora")
