"""List what this environment has for training and generation, what is missing, and what that costs.

Exits with 1 if something must be installed first.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.options import Options, option
from modules.script_options import parse_options


class DoctorOptions(Options):
    """Options of the report."""

    share: bool = option(
        "print five lines on versions and the GPU instead, for a report to others: no names and no paths"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print which packages and devices are found; exit with code 1 if something necessary is missing."""
    (options,) = parse_options(__doc__, argv, DoctorOptions)
    if options.share:
        from runtime.machine import describe_machine, list_shared_lines  # torch is imported, if there is one

        sys.stdout.writelines(f"{line}\n" for line in list_shared_lines(describe_machine()))
        return

    from runtime.doctor import examine  # it imports torch, if there is one

    findings = examine(Path.cwd())
    width = max(len(finding.name) for finding in findings)
    sys.stdout.writelines(f"{finding.name:{width}}  {finding.text}\n" for finding in findings)
    if not all(finding.is_fit for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    command_line(main, needs_packages=False)
