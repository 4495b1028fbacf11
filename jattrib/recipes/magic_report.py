"""What the MAGIC recipe shows: its figures, its pictures, its report."""

from typing import NamedTuple

import numpy as np

from jattrib.recipes import plot, report, rundir
from jattrib.recipes.experiment import FixedTruth, Task
from jattrib.recipes.magic_stages import Config, Cost, Descended, Fidelity, Found

GRID = 41
"""Weights at which the share of labels below is drawn."""


class Results(NamedTuple):
    """What the stages found."""

    config: Config
    task: Task
    found: Found
    truths: tuple[FixedTruth, ...]
    fidelity: Fidelity
    cost: Cost
    descent: Descended


Drawn = tuple[plot.Figure, str, str]
"""A picture, what it shows in words, and what to see in it."""


def write(directory: rundir.RunDir, results: Results) -> None:
    """Write pictures, report and summary into the run's directory."""
    pictures = {
        "lds_by_fraction": _lds_picture(results),
        "predicted_actual": _prediction_picture(results),
        "descent_weights": _weights_picture(results),
        "descent_accuracy": _accuracy_picture(results),
    }
    for name, (figure, _, _) in pictures.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    shown = {name: report.picture(figure, alt=alt, caption=text) for name, (figure, alt, text) in pictures.items()}
    report.write(directory, _report(results, shown))
    rundir.finish(directory, _figures(results))


def percent(fraction: float) -> str:
    """Return a fraction as it stands in the names of figures.

    >>> percent(0.01), percent(0.005)
    ('1pct', '0_5pct')
    """
    return f"{100 * fraction:g}pct".replace(".", "_")


def _figures(results: Results) -> dict[str, float | int | str]:
    fidelity, cost, descent, info = results.fidelity, results.cost, results.descent, results.found.info
    figures: dict[str, float | int | str] = {}
    fractions = results.config.method.fractions
    for at, fraction in enumerate(fractions):
        name, found = percent(fraction), fidelity.fixed[at]
        figures |= {
            f"lds_fixed_{name}": found.mean,
            f"lds_fixed_{name}_low": found.low,
            f"lds_fixed_{name}_high": found.high,
            f"lds_fixed_similarity_{name}": fidelity.similarity[at].mean,
            f"relative_error_{name}": fidelity.error[at],
        }
    return figures | {
        "lds_expected": fidelity.expected.mean,
        "lds_expected_low": fidelity.expected.low,
        "lds_expected_high": fidelity.expected.high,
        "lds_expected_ceiling": fidelity.ceiling.value,
        "metasmoothness": info.metasmoothness,
        "derivative_growth": info.growth,
        f"trainings_per_{cost.queries}_queries": cost.metagradient / cost.training,
        "training_ms": 1e3 * cost.training,
        f"metagradient_{cost.queries}_queries_ms": 1e3 * cost.metagradient,
        **({} if descent.recovered is None else {"descend_recovered_fraction": descent.recovered}),
        "descend_auc": descent.recall.auc.value,
        "descend_auc_low": descent.recall.auc.low,
        "descend_auc_high": descent.recall.auc.high,
        "descend_accuracy_clean": descent.clean,
        "descend_accuracy_flipped": float(descent.accuracies[0]),
        "descend_accuracy": descent.accuracy,
        "descend_accuracy_weighted": float(descent.accuracies[descent.step]),
        "descend_cutoff": descent.cutoff,
        "descend_step": descent.step,
        "queries": len(results.task.queries.labels),
        "models_per_fraction": len(results.truths[0].masks),
        "models_trained": sum(len(truth.masks) + 1 for truth in results.truths)
        + results.config.evaluation.subsets * results.config.evaluation.seeds,
    }


def _lds_picture(results: Results) -> Drawn:
    fidelity, fractions = results.fidelity, np.array(results.config.method.fractions)
    both = (fidelity.fixed, fidelity.similarity)
    mean, low, high = (
        np.array([[getattr(each, end) for each in row] for row in both]) for end in ("mean", "low", "high")
    )
    figure = plot.line_with_band(
        100 * fractions, mean, low, high, labels=plot.Labels("training images left out (%)", "LDS of the one run"),
        names=("MAGIC", "cosine of pixels"), log_x=True,
    )  # fmt: skip
    parts = map(report.percent, fractions)
    points = ", ".join(f"{value:.3f} at {part}" for part, value in zip(parts, mean[0], strict=True))
    return (
        figure,
        f"Linear datamodeling score of one run against the part of the training set that is left out: {points}.",
        "The derivative of training is exact for small changes of the weights: the fewer images are left out, the "
        "better it predicts the very same run without them. The band is the 95% interval over queries and models.",
    )


def _prediction_picture(results: Results) -> Drawn:
    """The query whose own correlation is the median, where the least is left out."""
    found, truth = results.fidelity.fixed[0], results.truths[0]
    query = int(np.argsort(found.per_query)[len(found.per_query) // 2])
    predicted = truth.whole[query] - (~truth.masks) @ results.found.scores[:, query]
    rho, fraction = found.per_query[query], results.config.method.fractions[0]
    figure = plot.scatter_predicted_actual(
        predicted, truth.outputs[:, query],
        labels=plot.Labels("predicted margin (nats)", "margin of the run without them (nats)"),
        note=f"Spearman's ρ = {rho:.3f}",
    )  # fmt: skip
    return (
        figure,
        f"Margin of one query after the run without {report.percent(fraction)} of the images against the prediction: "
        f"rank correlation {rho:.3f}.",
        f"Each dot is the same run without another random {report.percent(fraction)} of the training images: across, "
        "its margin of today minus the scores of what is left out; up, what training gives. Both axes are nats; "
        "nothing is fitted but the dashed line. The query is the median by correlation.",
    )


def _weights_picture(results: Results) -> Drawn:
    descent = results.descent
    grid = np.linspace(0, float(descent.weights.max()), GRID)
    shares = np.array([
        [np.mean(descent.weights[which] <= weight) for weight in grid] for which in (descent.flipped, ~descent.flipped)
    ])  # fmt: skip
    figure = plot.line_with_band(
        grid, shares, shares, shares, labels=plot.Labels("weight after descent", "share of images no heavier"),
        names=("wrong label", "right label"),
    )  # fmt: skip
    auc = descent.recall.auc.value
    return (
        figure,
        f"Share of images below each weight, for wrong and for right labels: area under the curve {auc:.3f}.",
        f"Descent was not told which labels are wrong: a wrong one is lighter than a right one with probability "
        f"{auc:.3f}, where ½ is chance.",
    )


def _accuracy_picture(results: Results) -> Drawn:
    descent = results.descent
    steps = np.arange(len(descent.accuracies), dtype=float)
    figure = plot.line_with_band(
        steps, descent.accuracies, descent.accuracies, descent.accuracies,
        labels=plot.Labels("steps of descent", "accuracy on other test images"),
        references={"all labels right": descent.clean, "light ones left out": descent.accuracy},
    )  # fmt: skip
    return (
        figure,
        f"Test accuracy by step of descent, from {descent.accuracies[0]:.3f} to {descent.accuracies[-1]:.3f}, "
        f"{descent.accuracy:.3f} without the lightest; with all labels right it is {descent.clean:.3f}.",
        "A long run, which learns wrong labels by heart, on the weights that each step found with the derivative of a "
        f"short one. Step {descent.step} is the best on validation images. What is reported leaves out, from its "
        f"weights, images no heavier than {descent.cutoff:g}, the cutoff that is best there too; the images whose "
        "accuracy is shown had no part in training, descent or choice.",
    )


def _lead(results: Results) -> str:
    found, fraction = results.fidelity.fixed[0], results.config.method.fractions[0]
    descent, cost = results.descent, results.cost
    wrong = f"{report.percent(results.config.descent.flipped)} wrong labels"
    regained = f"{wrong} took no accuracy."
    if descent.recovered is not None:
        part = f"{descent.recovered:.0%}" if descent.recovered > 0 else "none"
        regained = f"Descent on the images' weights brings back {part} of the accuracy that {wrong} took."
    return (
        f"The scores predict what this very run does without a random {report.percent(fraction)} of its images with a "
        f"linear datamodeling score of {found.mean:.3f} ({found.low:.3f} to {found.high:.3f}); the cost of "
        f"{report.counted(cost.queries, 'query')} is {cost.metagradient / cost.training:.1f} trainings. {regained}"
    )


def _headlines(results: Results) -> tuple[report.KeyFigure, ...]:
    found, auc = results.fidelity.fixed[0], results.descent.recall.auc
    fraction = results.config.method.fractions[0]
    return (
        report.KeyFigure(
            f"LDS, {report.percent(fraction)} left out", found.mean, found.low, found.high, "seed and order fixed"
        ),
        report.KeyFigure("Metasmoothness", results.found.info.metasmoothness, meaning="1 is smooth"),
        report.KeyFigure("Wrong labels found", auc.value, auc.low, auc.high, "area under the curve"),
    )


def _key_figures(results: Results) -> tuple[report.KeyFigure, ...]:
    fidelity, figure = results.fidelity, report.KeyFigure
    fixed = [
        figure(f"LDS, {report.percent(part)} left out", each.mean, each.low, each.high, "seed and order fixed")
        for part, each in zip(results.config.method.fractions, fidelity.fixed, strict=True)
    ]
    expected = fidelity.expected
    return (
        *fixed,
        figure("LDS, expected outputs", expected.mean, expected.low, expected.high, "random halves, over seeds"),
        figure("Its noise ceiling", fidelity.ceiling.value, meaning="what perfect scores would reach there"),
        figure(
            f"Trainings for {report.counted(results.cost.queries, 'query')}",
            results.cost.metagradient / results.cost.training, meaning="one replay for all of them",
        ),
        figure("Growth of the derivative", results.found.info.growth, meaning="towards the start of training"),
        figure("Accuracy, right labels", results.descent.clean, meaning="on test images that nothing else used"),
        figure("Accuracy, flipped labels", float(results.descent.accuracies[0])),
        figure("Accuracy, after descent", results.descent.accuracy),
        *(
            ()
            if results.descent.recovered is None
            else (figure("Accuracy recovered", results.descent.recovered, meaning="of what wrong labels took"),)
        ),
    )  # fmt: skip


def _method(results: Results) -> tuple[str, ...]:
    config, task, descent = results.config, results.task, results.config.descent
    return (
        f"One run on {len(task.train.labels):,} images, {report.counted(config.training.epochs, 'epoch')} of batches "
        f"of {config.training.batch_size}. Its metagradient for {len(task.queries.labels)} test images is exact "
        "reverse-mode differentiation through all of its steps.",
        f"LDS of the one run: {config.method.subsets} random subsets for each fraction; initialisation and order stay, "
        "and what is left out weighs nothing. Mean over queries of Spearman's ρ, 95% bootstrap intervals over queries "
        "and models together. Nothing was chosen on these models.",
        f"LDS against expected outputs, another quantity: {config.evaluation.subsets} random subsets of "
        f"{report.percent(config.evaluation.alpha)}, {config.evaluation.seeds} seeds each.",
        f"Cost: seconds of a metagradient over seconds of the same training, both compiled, on {rundir.device()}.",
        f"Descent: {report.percent(descent.flipped)} of the labels are moved to a random other class; "
        f"{report.counted(descent.steps, 'step')} along the metagradient of the mean {descent.objective} on "
        f"{descent.validation:,} validation images, over {report.counted(descent.runs, 'short run')}, each step of a "
        f"root mean square of {descent.rate:g}. Accuracies are those of "
        f"{report.counted(descent.training.epochs, 'epoch')} at a rate of {descent.training.learning_rate:g}; all "
        "settings were chosen at other seeds.",
    )


def _report(results: Results, pictures: dict[str, report.Picture]) -> report.Report:
    return report.Report(
        title="What would this run have done without these images?",
        lead=_lead(results),
        headlines=_headlines(results),
        figures=_key_figures(results),
        sections=(
            report.Section("Are the scores true?", (pictures["lds_by_fraction"], pictures["predicted_actual"])),
            report.Section("Wrong labels", (pictures["descent_weights"], pictures["descent_accuracy"])),
        ),
        method=_method(results),
    )
