"""A further part of a run's page: a heading with notes, diagrams and a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class PageSection:
    """A part of a run's page. Texts are escaped; pictures and diagrams are Markup."""

    key: str  # of its address on the page
    title: str
    notes: Sequence[str] = ()
    charts: Sequence[Markup] = ()
    headings: Sequence[str] = ()
    rows: "Sequence[Sequence[str | Markup]]" = ()
