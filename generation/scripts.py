"""Make the generation scripts of a family: read its options, then hand it to the generation loop."""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from generation.options import GenerationOptions, read_generation
from generation.script_options import ScriptDefaults
from modules.command import begin_loading, drop_repeated_warnings, name_as_typed
from modules.options import option_values
from protocols.families import FAMILIES, Script


def generation_script(
    family: str,
    defaults: ScriptDefaults,
    docstring: str | None,
    *,
    adjust_options: Callable[[GenerationOptions, Any], tuple[GenerationOptions, Any]] | None = None,
    change_parser: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> Script:
    """Return the script that generates with a family.

    The script's function takes an optional second argument, a function that is called with the family and the
    options instead of `generate`.

    Args:
        family: Name of the family.
        defaults: Defaults of the family for shared options.
        docstring: Docstring of the script, for --help.
        adjust_options: Checks and changes the shared and the family's options after they are parsed.
        change_parser: Changes the parser after the family's options are added.
    """
    entry = FAMILIES[family]

    def generate_with(argv: Sequence[str] | None = None, make: Callable[..., None] | None = None) -> None:
        """Parse the command line and generate; `make` replaces `generate`, for other tools."""
        record = entry.options_record("Generation")
        with contextlib.ExitStack() as stack:
            warnings = stack.enter_context(contextlib.ExitStack())
            warnings.enter_context(drop_repeated_warnings())
            options, family_options = read_generation(
                docstring, defaults, record=record, argv=argv, add_more=change_parser
            )
            stack.enter_context(name_as_typed(options.typed_names))
            if adjust_options is not None:  # may change which options were typed
                options, family_options = adjust_options(options, family_options)
                stack.enter_context(name_as_typed(options.typed_names))
            if options.latent_path or options.from_file is not None or options.interactive:
                options.warn_about_ignored_options()
            if entry.notice:
                entry.log_notice()
            if options.interactive:  # a prompt may repeat the warnings of an earlier one
                warnings.close()
            begin_loading()
            from generation.run import generate  # torch loads here, after every option has been read
            from modules.devices import make_deterministic

            if option_values(family_options).get("reproduce"):
                make_deterministic()
            if options.output.bell and not options.interactive:
                from generation.asking import ring_after  # only with --bell

                stack.enter_context(ring_after(True))
            (make or generate)(entry.make_family("generation", family_options), options)

    return Script.for_family(family, generate_with)
