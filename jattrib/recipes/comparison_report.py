"""What the comparison shows: its figures, its table, its pictures, its report."""

from typing import NamedTuple

import numpy as np

from jattrib.metrics import brittleness
from jattrib.metrics.lds import LDS
from jattrib.recipes import plot, report, rundir
from jattrib.recipes.comparison_base import Config
from jattrib.recipes.comparison_stages import Flips, Measured, References
from jattrib.recipes.experiment import Task

REMOVED = (0.002, 0.005, 0.01, 0.02, 0.04, 0.1, 0.2)
"""Parts of the training set at which flipped predictions are counted, and at the largest that is removed."""


class Results(NamedTuple):
    """What the stages found."""

    config: Config
    task: Task
    measured: tuple[Measured, ...]
    references: References
    flips: Flips


Drawn = tuple[plot.Figure, str, str]
"""A picture, what it shows in words, and what to see in it."""


def write(directory: rundir.RunDir, results: Results) -> None:
    """Write pictures, report and summary into the run's directory."""
    pictures = {
        "lds_expected_by_cost": _cost_picture(results, fixed=False),
        "lds_fixed_by_cost": _cost_picture(results, fixed=True),
        "brittleness": _brittle_picture(results),
    }
    for name, (figure, _, _) in pictures.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    shown = {name: report.picture(figure, alt=alt, caption=text) for name, (figure, alt, text) in pictures.items()}
    report.write(directory, _report(results, shown))
    rundir.finish(directory, _figures(results))


def percent(fraction: float) -> str:
    """Return a part as it stands in a key: `0.01` is `1pct`, `0.002` is `0_2pct`."""
    return f"{100 * fraction:g}pct".replace(".", "_")


def _figures(results: Results) -> dict[str, float | int | str]:
    left_out = percent(results.config.evaluation.fixed_fraction)
    figures: dict[str, float | int | str] = {
        "lds_expected_ceiling": results.references.ceiling.value,
        "lds_expected_chance_high": results.references.expected_chance.high,
        f"lds_fixed_{left_out}_chance_high": results.references.fixed_chance.high,
    }
    for each in results.measured:
        for protocol, found in (
            (f"lds_expected_{each.method.name}", each.expected),
            (f"lds_fixed_{left_out}_{each.method.name}", each.fixed),
        ):
            figures |= {protocol: found.mean, f"{protocol}_low": found.low, f"{protocol}_high": found.high}
        figures[f"cost_trainings_{each.method.name}"] = each.trainings
        figures[f"cost_seconds_{each.method.name}"] = each.seconds
        if each.expected_choice is not None and each.fixed_choice is not None:
            figures[f"choice_expected_{each.method.name}"] = each.expected_choice
            figures[f"choice_fixed_{left_out}_{each.method.name}"] = each.fixed_choice
    sizes = _sizes(results)
    for name, found in results.flips.found.items():
        fractions = brittleness.flipped(found, np.array(list(sizes.values()))).fraction
        figures |= {
            f"flipped_{percent(part)}_{name}": each for part, each in zip(sizes, fractions.tolist(), strict=True)
        }
    return figures | {
        "queries": len(results.task.queries.labels),
        "queries_flipped_at": len(results.flips.queries),
        "models_trained": _models_trained(results),
        "strategy": results.task.members.strategy,
    }


def _models_trained(results: Results) -> int:
    evaluation = results.config.evaluation
    expected = (evaluation.subsets + evaluation.held_out_subsets) * evaluation.seeds
    fixed = evaluation.fixed_subsets + evaluation.fixed_held_out_subsets + 2
    method = results.config.method
    return method.checkpoints + method.datamodels + 1 + expected + fixed + results.flips.trained


def _sizes(results: Results) -> dict[float, int]:
    """Return the numbers of removed images at which flipped predictions are counted, by the part that they are."""
    n, most = len(results.task.train.labels), results.config.evaluation.counterfactual_fraction
    sizes = {part: round(part * n) for part in REMOVED if part < most and round(part * n) >= 1}
    return sizes | {most: results.flips.limit}


def _left_out(results: Results) -> str:
    return report.percent(results.config.evaluation.fixed_fraction)


def _cost_picture(results: Results, *, fixed: bool) -> Drawn:
    found = [each.fixed if fixed else each.expected for each in results.measured]
    mean, low, high = (np.array([getattr(each, end) for each in found]) for end in ("mean", "low", "high"))
    cost = np.array([each.seconds for each in results.measured])
    titles = [each.method.title for each in results.measured]
    ceiling = {} if fixed else {"noise ceiling": results.references.ceiling.value}
    protocol = f"one run without {_left_out(results)}" if fixed else "expected outputs over random subsets"
    figure = plot.named_points(
        cost, mean, low, high, names=titles, references=ceiling,
        labels=plot.Labels("seconds, training included", f"LDS, {protocol}"),
    )  # fmt: skip
    points = ", ".join(f"{title} {value:.2f}" for title, value in zip(titles, mean, strict=True))
    caption = (
        "What one training run would have done without a few images: its ceiling is 1."
        if fixed
        else "What training is expected to do on a random subset: nothing can score above the noise ceiling on average."
    )
    return figure, f"Linear datamodeling score against cost ({protocol}): {points}.", caption


def _brittle_picture(results: Results) -> Drawn:
    sizes, flips = np.array(list(_sizes(results).values())), results.flips
    titles = {each.method.name: each.method.title for each in results.measured}
    curves = [brittleness.flipped(found, sizes) for found in flips.found.values()]
    mean, low, high = (np.stack([getattr(each, end) for each in curves]) for end in ("fraction", "low", "high"))
    names = [titles[name] for name in flips.found]
    figure = plot.line_with_band(
        sizes.astype(float), mean, low, high, names=names, log_x=True,
        labels=plot.Labels("training images removed at most", "part of predictions flipped"),
    )  # fmt: skip
    last = ", ".join(f"{value:.0%} by {name}" for name, value in zip(names, mean[:, -1], strict=True))
    return (
        figure,
        f"Part of {len(flips.queries)} predictions that flip without at most so many images: {last} at {sizes[-1]}.",
        f"{len(flips.queries)} predictions of the one run, all correct. For each ranking the smallest removal that "
        "flips them was sought by bisection, and each flip seen in a retrained model. Bands are Wilson's 95% intervals "
        "over queries.",
    )


def _table(results: Results) -> report.Listing:
    def interval(found: LDS) -> str:
        return f"{report.number(found.low)} to {report.number(found.high)}"

    def chosen(each: Measured) -> str:
        if each.expected_choice is None or each.fixed_choice is None:
            return ""
        return f"{each.expected_choice:g}, {each.fixed_choice:g}"

    rows = [
        (
            each.method.title, each.expected.mean, interval(each.expected), each.fixed.mean, interval(each.fixed),
            each.trainings, each.seconds, chosen(each),
        )
        for each in sorted(results.measured, key=lambda each: -each.expected.mean)
    ]  # fmt: skip
    columns = (
        "Method", "LDS, expected", "95% interval", f"LDS, one run without {_left_out(results)}", "95% interval",
        "Trainings", "Seconds", "Chosen",
    )  # fmt: skip
    return report.Listing(columns, tuple(rows), "Every method on the same models and queries, best first.")


def _lead(results: Results) -> str:
    best = max(results.measured, key=lambda each: each.expected.mean)
    one = max(results.measured, key=lambda each: each.fixed.mean)
    ceiling = results.references.ceiling.value
    return (
        f"Of {len(results.measured)} methods, {best.method.title} predicts best what training on random subsets is "
        f"expected to do: an LDS of {best.expected.mean:.2f} ({best.expected.low:.2f} to {best.expected.high:.2f}) "
        f"where noise allows {ceiling:.2f}, for {best.trainings:.3g} trainings. What one run would have done without "
        f"{_left_out(results)} of its images is best predicted by {one.method.title}: {one.fixed.mean:.2f} "
        f"({one.fixed.low:.2f} to {one.fixed.high:.2f}), for {one.trainings:.3g} trainings."
    )


def _method(results: Results) -> tuple[str, ...]:
    evaluation, n = results.config.evaluation, len(results.task.train.labels)
    return (
        f"LDS: mean over {len(results.task.queries.labels)} queries of Spearman's ρ between summed scores and margins "
        "of retrained models; 95% bootstrap intervals over queries and models together. Expected: "
        f"{evaluation.subsets} random subsets of {report.percent(evaluation.alpha)}, {evaluation.seeds} seeds each, "
        f"averaged. One run: {evaluation.fixed_subsets} repetitions of one training run on {n:,} images without a "
        f"random {_left_out(results)}, initialisation and order unchanged. The two are different quantities.",
        f"Dampings were chosen on held-out models: {evaluation.held_out_subsets} subsets for the one, "
        f"{evaluation.fixed_held_out_subsets} repetitions for the other. No method sees the models that judge it.",
        "Trainings: a model on a random subset counts as the part of the images that it is trained on, a run on all as "
        "one, and MAGIC's replay as the time that it takes divided by that of a training. Seconds: all of this, "
        "gradients, solves and the choice of dampings. The held-out models, which all share, and compilation are not "
        "counted.",
    )


def _report(results: Results, pictures: dict[str, report.Picture]) -> report.Report:
    figure, references = report.KeyFigure, results.references
    best = max(results.measured, key=lambda each: each.expected.mean)
    one = max(results.measured, key=lambda each: each.fixed.mean)
    return report.Report(
        title="Which attribution is true, and at what cost?",
        lead=_lead(results),
        headlines=(
            figure("LDS, expected", best.expected.mean, best.expected.low, best.expected.high, best.method.title),
            figure("LDS, one run", one.fixed.mean, one.fixed.low, one.fixed.high, one.method.title),
            figure("Noise ceiling", references.ceiling.value, meaning="of the expected LDS"),
        ),
        figures=(
            figure(
                "LDS of random scores, expected",
                *references.expected_chance,
                meaning="chance: 95% of draws lie between",
            ),
            figure("LDS of random scores, one run", *references.fixed_chance, meaning="likewise"),
            figure("Seed-to-seed correlation", references.ceiling.correlation, meaning="of which the ceiling is made"),
            figure("Models trained", _models_trained(results), meaning="for methods, truths and flips"),
        ),
        sections=(
            report.Section("All methods", (_table(results),)),
            report.Section("Truth against cost", (pictures["lds_expected_by_cost"], pictures["lds_fixed_by_cost"])),
            report.Section("How few images flip a prediction", (pictures["brittleness"],)),
        ),
        method=_method(results),
    )
