"""Percentile bootstrap intervals: over one axis, or over two jointly.

A statistic is written as a function of counts, how often each unit stands in each resample, so that all resamples are
computed at once and nothing is copied.  Of two axes (queries and models) each is resampled on its own, and a cell
counts as often as the product says: an interval over queries alone is too narrow, since queries share the models.

Source: Efron and Tibshirani 1993, sections 13.3 (percentiles) and 10.3 (bias); Owen 2007, "The pigeonhole bootstrap"
(two axes), whose variance is right or slightly too large.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from jattrib.core.errors import InvalidInputError

UNDEFINED = 0.05
"""The largest part of resamples in which a statistic may be undefined."""


class Interval(NamedTuple):
    """An estimate and its interval."""

    value: float
    low: float
    high: float


def mean(
    values: Num[Array | np.ndarray, " n"], *, key: Key[Array, ""], resamples: int = 1000, confidence: float = 0.95
) -> Interval:
    """Return the mean of independent values and its interval.

    Of few values (below about 20) percentiles are too narrow by a factor of about √(1 − 1/n).

    Args:
        values: one a unit.
        key: fixes the resamples.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: there are fewer than two values, or more than one axis of them, one is not finite, or
            `confidence` is not between 0 and 1.
    """
    values = _finite(values, axes=1)

    def statistic(counts: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
        return counts @ values / counts.sum(axis=1)

    return one_way(statistic, len(values), key=key, resamples=resamples, confidence=confidence)


def mean_two_way(
    values: Num[Array | np.ndarray, "m n"], *, key: Key[Array, ""], resamples: int = 1000, confidence: float = 0.95
) -> Interval:
    """Return the mean of a table and its interval over rows and columns jointly.

    The arguments and errors are those of `mean`.
    """
    values = _finite(values, axes=2)

    def statistic(rows: Int[np.ndarray, "r m"], columns: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
        sums = np.einsum("rn,rn->r", rows @ values, columns)
        return sums / (rows.sum(axis=1) * columns.sum(axis=1))

    return two_way(statistic, (values.shape[0], values.shape[1]), key=key, resamples=resamples, confidence=confidence)


def one_way(
    statistic: Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]],
    units: int,
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
    centred: bool = False,
) -> Interval:
    """Return a statistic of n units and its interval.

    Args:
        statistic: its value in each of r resamples, from how often each unit stands in them; not finite where
            undefined.
        units: n.
        key: fixes the resamples.
        resamples: how many.
        confidence: the coverage that is asked for.
        centred: see `percentile`.

    Raises:
        InvalidInputError: there are fewer than two units, `confidence` is not between 0 and 1, or the statistic is
            undefined on the sample or on more than 5% of the resamples.
    """
    drawn = counts(generator(key), units, resamples=resamples)
    value = statistic(np.ones((1, units), np.int64))[0]
    return percentile(float(value), statistic(drawn), confidence=confidence, centred=centred)


def two_way(
    statistic: Callable[[Int[np.ndarray, "r m"], Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]],
    units: tuple[int, int],
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
    centred: bool = False,
) -> Interval:
    """Return a statistic of a table of m by n and its interval over both axes jointly.

    Args:
        statistic: its value in each of r resamples, from how often each row and each column stands in them.
        units: m and n.
        key: fixes the resamples.
        resamples: how many.
        confidence: the coverage that is asked for.
        centred: see `percentile`.

    Raises:
        InvalidInputError: as in `one_way`.
    """
    ones = [np.ones((1, each), np.int64) for each in units]
    random = generator(key)
    drawn = [counts(random, each, resamples=resamples) for each in units]
    return percentile(float(statistic(*ones)[0]), statistic(*drawn), confidence=confidence, centred=centred)


def generator(key: Key[Array, ""]) -> np.random.Generator:
    """Return NumPy's generator for a typed key: the metrics compute on the host, in float64."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())


def counts(random: np.random.Generator, units: int, *, resamples: int) -> Int[np.ndarray, "resamples units"]:
    """Draw resamples of n units with replacement, and return how often each unit stands in each.

    Raises:
        InvalidInputError: there are fewer than two units, or no resample.
    """
    if units < 2 or resamples < 1:
        raise InvalidInputError(
            f"{resamples} resamples of {units} units",
            expected="one resample or more, of at least two units",
            remedy="measure on more queries or models; 1,000 resamples are usual",
        )
    return random.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.int64)


def percentile(
    value: float, draws: Float[np.ndarray, " r"], *, confidence: float = 0.95, centred: bool = False
) -> Interval:
    """Return the interval between the percentiles of the draws; those not finite are left out if they are few.

    Args:
        value: the statistic of the sample.
        draws: that of each resample.
        confidence: the coverage that is asked for.
        centred: move the interval by `value − mean(draws)`, for a statistic that resampling shifts.

    Raises:
        InvalidInputError: `confidence` is not between 0 and 1, `value` is not finite, or more than 5% of the draws are
            undefined.
    """
    if not 0 < confidence < 1:
        raise InvalidInputError(
            f"confidence = {confidence}", expected="a number between 0 and 1", remedy="0.95 is usual"
        )
    defined = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(defined) < (1 - UNDEFINED) * len(draws):
        raise InvalidInputError(
            f"a statistic of {value}, undefined in {len(draws) - len(defined)} of {len(draws)} resamples",
            expected=f"one that is defined on the sample and on {1 - UNDEFINED:.0%} of its resamples",
            remedy="measure on more units, or leave out what does not vary",
        )
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    shift = value - defined.mean() if centred else 0.0
    return Interval(value, float(low + shift), float(high + shift))


def _finite(values: Num[Array | np.ndarray, "*shape"], *, axes: int) -> Float[np.ndarray, "*shape"]:
    values = np.asarray(values, np.float64)
    if values.ndim != axes:
        raise InvalidInputError(
            f"values of the shape {list(values.shape)}",
            expected="one axis over units" if axes == 1 else "a table, of two axes over units",
            remedy="use `mean` for values of independent units, `mean_two_way` for a table of rows and columns",
        )
    if not np.isfinite(values).all():
        raise InvalidInputError(
            f"{np.count_nonzero(~np.isfinite(values))} of {values.size} values are not finite",
            expected="finite numbers",
            remedy="look for models that diverged, or leave out what is undefined",
        )
    return values
