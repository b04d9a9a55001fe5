"""What a run will make, as far as its options say, for the memory plan."""

from collections.abc import Sequence
from operator import sub

from generation.options import GenerationOptions
from generation.prompt_lines import parse_generation_line, read_generation_lines
from generation.request import prepare_line
from generation.session import needs_media
from generation.sheet_options import cells_of
from modules.contract.family import Family
from modules.contract.prepared import Prepared
from modules.errors import OptionError, UserError
from modules.planning.dry_run import quiet


def all_requests(family: Family, options: GenerationOptions) -> list[Prepared]:
    """Return what the run makes, in its order; at least one.

    Invalid lines are skipped if at least one line is valid; their errors are reported when their turn comes.
    """
    lines = (
        [""] if options.from_file is None else [line for _, line in read_generation_lines(options.from_file)]
    )
    requests, errors = [], []
    for line in lines:
        try:
            with quiet():
                says = parse_generation_line(line, options.line_options) if line else {}
                for _, values in cells_of(options.axes, says):
                    requests.append(prepare_line(family, options, values))
        except UserError as error:
            errors.append(error)
    if not requests:
        raise errors[0] if errors else OptionError(f"--from_file {options.from_file}: the file has no prompt")
    return requests


def largest_of(family: Family, requests: Sequence[Prepared]) -> list[Prepared]:
    """Return the requests that no other request exceeds in both frame size and number of frames.

    Usually there is one. Which of several needs most memory only a rehearsal can tell: a video that is made
    in sections needs no more memory when it is longer.
    """
    # of equal ones the last that has something to encode
    requests = sorted(requests, key=lambda prepared: needs_media(family, prepared))
    sizes = {(prepared.width * prepared.height, prepared.frames): prepared for prepared in requests}
    largest = [
        size
        for size in sizes
        if not any(other != size and min(map(sub, other, size)) >= 0 for other in sizes)
    ]
    return [sizes[size] for size in largest]
