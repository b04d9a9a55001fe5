"""Failures in a run of several pieces of work while the rest goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from modules.errors import OptionError, UserError

logger = logging.getLogger(__name__)


@dataclass
class Failures:
    """Jobs that failed, and why. strict: the first failure ends the run."""

    strict: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    _codes: set[int] = field(default_factory=set, init=False)

    @contextmanager
    def note_errors(self, label: str, fatal: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Record an error of the block and go on, unless the error is `fatal`."""
        try:
            yield
        except Exception as error:
            if self.strict or isinstance(error, fatal):
                raise
            self.reasons[label] = f"{type(error).__name__}: {error}"
            self._codes.add(error.exit_code if isinstance(error, UserError) else UserError.exit_code)
            is_known = isinstance(error, (UserError, torch.OutOfMemoryError))
            logger.error("%s is skipped. %s", label, self.reasons[label], exc_info=not is_known)

    def raise_if_any(self, total: int, where: str = "") -> None:
        """Raise UserError listing the failures. where: begins the message, as "prompts.txt: ".

        If all failures share an exit code that says more than 1 or 2, the error has that one.
        """
        if not self.reasons:
            return
        lines = "\n".join(f"  {label}: {reason}" for label, reason in self.reasons.items())
        error = UserError(f"{where}{len(self.reasons)} of {total} failed:\n{lines}")
        if len(self._codes) == 1 and max(self._codes) > OptionError.exit_code:
            (error.exit_code,) = self._codes
        raise error
