"""Errors that say what came, what was expected, and the remedy."""

import difflib
from collections.abc import Iterable


class JattribError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it on one screen."""

    def __init__(self, got: str, *, expected: str, remedy: str):
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"{got}\n  expected: {expected}\n  remedy:   {remedy}")


class InvalidInputError(JattribError, ValueError):
    """An argument, a config or a data file is not what the function can work with."""


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse an option that is none of those that there are.

    Raises:
        InvalidInputError: it is none.
    """
    names = tuple(known)
    if value not in names:
        match = difflib.get_close_matches(str(value), names, n=1)
        raise InvalidInputError(
            f"{name} = {value!r}",
            expected=f"one of {', '.join(names)}",
            remedy=f"did you mean {match[0]!r}?" if match else "name one of them",
        )


class StoreError(JattribError, OSError):
    """Something on disk is missing, truncated, altered, or belongs to another run."""


class DivergedError(JattribError, FloatingPointError):
    """A computation left the finite numbers: a loss, a solver, a factorisation."""


class WorkerError(JattribError, RuntimeError):
    """A process that was started to share the work has ended before its time."""
