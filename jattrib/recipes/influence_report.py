"""What the influence recipe shows: its figures, its table, its pictures, its report."""

from typing import NamedTuple

import numpy as np

from jattrib.metrics import lds
from jattrib.recipes import comparison_report, influence_stages, plot, report, rundir, trak_report
from jattrib.recipes.comparison_report import Drawn
from jattrib.recipes.comparison_stages import References, Truths
from jattrib.recipes.experiment import LeftOut, Task
from jattrib.recipes.influence_stages import Config, Curve


class Results(NamedTuple):
    """What the stages found; the first attributor is the one whose images are shown and left out."""

    config: Config
    task: Task
    measured: tuple[Curve, ...]
    references: References
    truths: Truths
    left_out: LeftOut


def write(directory: rundir.RunDir, results: Results) -> None:
    """Write pictures, report and summary into the run's directory."""
    pictures = {
        "lds_by_damping": _damping_picture(results),
        "predicted_actual": _prediction_picture(results),
        "counterfactual": _counterfactual_picture(results),
    }
    for name, (figure, _, _) in pictures.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    rows = trak_report.gallery(results.config, results.task, results.measured[0].scores)
    grid = plot.attribution_grid(rows, title="Training images that helped and harmed a prediction most")
    plot.save_png(grid, directory.path / "attributions.png")
    shown = {name: report.picture(figure, alt=alt, caption=text) for name, (figure, alt, text) in pictures.items()}
    report.write(directory, _report(results, shown, rows))
    rundir.finish(directory, _figures(results))


def _figures(results: Results) -> dict[str, float | int | str]:
    left_out, effect = comparison_report.percent(results.config.evaluation.fixed_fraction), results.left_out.effect
    figures: dict[str, float | int | str] = {
        "lds_expected_ceiling": results.references.ceiling.value,
        "lds_expected_chance_high": results.references.expected_chance.high,
        f"lds_fixed_{left_out}_chance_high": results.references.fixed_chance.high,
    }
    for curve in results.measured:
        each, name = curve.found, curve.found.method.name
        for protocol, found in ((f"lds_expected_{name}", each.expected), (f"lds_fixed_{left_out}_{name}", each.fixed)):
            figures |= {protocol: found.mean, f"{protocol}_low": found.low, f"{protocol}_high": found.high}
        figures[f"attributing_{name}_s"] = curve.seconds
        figures[f"agreement_with_cg_{name}"] = _with_cg(results, curve)
        if each.expected_choice is not None and each.fixed_choice is not None:
            figures[f"damping_expected_{name}"] = each.expected_choice
            figures[f"damping_fixed_{left_out}_{name}"] = each.fixed_choice
    return figures | {
        "margin_drop_helpful_nats": effect.removed.value,
        "margin_drop_random_nats": effect.random.value,
        "margin_drop_difference_nats": effect.difference.value,
        "margin_drop_difference_nats_low": effect.difference.low,
        "margin_drop_difference_nats_high": effect.difference.high,
        "margin_drop_fraction_of_queries": effect.fraction,
        "images_left_out": results.left_out.images,
        "queries": len(results.task.queries.labels),
        "models_trained": _models_trained(results),
        "strategy": results.task.members.strategy,
    }


def _with_cg(results: Results, curve: Curve) -> float:
    exact = next(each for each in results.measured if each.found.method.name == "cg")
    return influence_stages.agreement(curve, exact)


def _models_trained(results: Results) -> int:
    evaluation = results.config.evaluation
    expected = (evaluation.subsets + evaluation.held_out_subsets) * evaluation.seeds
    fixed = evaluation.fixed_subsets + evaluation.fixed_held_out_subsets + 2
    return 1 + expected + fixed + 2 * results.left_out.queries + 1


def _damping_picture(results: Results) -> Drawn:
    curves = [curve for curve in results.measured if curve.found.expected_choice is not None]
    if not curves:  # one damping leaves no choice
        curves = list(results.measured[:1])
    values = np.array([list(curve.held_out.values()) for curve in curves])
    figure = plot.line_with_band(
        np.array(list(curves[0].held_out)), values, values, values, log_x=True,
        names=[curve.found.method.title for curve in curves],
        labels=plot.Labels("damping (in units of the mean eigenvalue)", "LDS on held-out models"),
    )  # fmt: skip
    words = "; ".join(
        f"{curve.found.method.title} "
        + ", ".join(f"{value:.2f} at {damping:g}" for damping, value in curve.held_out.items())
        for curve in curves
    )
    return (
        figure,
        f"LDS on held-out models against the damping: {words}.",
        "A damping that is too small follows directions of noise; one that is too large turns every method into the "
        "inner product of gradients. It was chosen on these models, and every other figure is measured on others.",
    )


def _prediction_picture(results: Results) -> Drawn:
    """The query whose own correlation is the median."""
    curve, truth = results.measured[0], results.truths.expected
    found = curve.found.expected
    query = int(np.argsort(found.per_query)[len(found.per_query) // 2])
    predicted, actual = lds.predict(curve.scores, truth.masks)[:, query], truth.outputs.mean(axis=1)[:, query]
    rho, label = found.per_query[query], results.task.classes[results.task.queries.labels[query]]
    figure = plot.scatter_predicted_actual(
        predicted, actual, labels=plot.Labels("sum of the subset's scores (nats)", "margin after retraining (nats)"),
        note=f"Spearman's ρ = {rho:.2f}",
    )  # fmt: skip
    return (
        figure,
        f"Margin of one query after retraining on {len(actual)} random subsets against the sum of the subset's scores: "
        f"rank correlation {rho:.2f}.",
        f"Each dot is a random subset of the training set: across, what {curve.found.method.title} predicts for one "
        f"query (the median query by correlation, class {label}); up, what the retrained models say.",
    )


def _counterfactual_picture(results: Results) -> Drawn:
    effect, images, title = results.left_out.effect, results.left_out.images, results.measured[0].found.method.title
    both = (effect.removed, effect.random)
    values, low, high = (np.array([getattr(each, end) for each in both]) for end in ("value", "low", "high"))
    figure = plot.bar_with_interval(
        ["most helpful left out", "random left out"], values, low, high,
        labels=plot.Labels("fall of the query's margin (nats)", ""),
    )  # fmt: skip
    return (
        figure,
        f"Mean fall of the margin: {values[0]:.2f} nats without the most helpful images, "
        f"{values[1]:.2f} without random ones.",
        f"Without the {images} training images that {title} calls most helpful for a query, its margin falls by "
        f"{values[0]:.2f} nats; without {images} random ones, by {values[1]:.2f}. {results.left_out.queries} queries, "
        "each with retrained models of its own.",
    )


def _table(results: Results) -> report.Listing:
    rows = []
    for curve in sorted(results.measured, key=lambda each: -each.found.expected.mean):
        found = curve.found
        rows.append((
            found.method.title, found.expected.mean, _interval(found.expected), found.fixed.mean,
            _interval(found.fixed), _with_cg(results, curve), curve.seconds,
            "" if found.expected_choice is None else f"{found.expected_choice:g}, {found.fixed_choice:g}",
        ))  # fmt: skip
    columns = (
        "Method", "LDS, expected", "95% interval", f"LDS, one run without {_left_out(results)}", "95% interval",
        "Agreement with CG", "Seconds", "Damping",
    )  # fmt: skip
    return report.Listing(columns, tuple(rows), "Every curvature at the same run, for the same queries, best first.")


def _interval(found: lds.LDS) -> str:
    return f"{report.number(found.low)} to {report.number(found.high)}"


def _left_out(results: Results) -> str:
    return report.percent(results.config.evaluation.fixed_fraction)


def _lead(results: Results) -> str:
    best = max(results.measured, key=lambda each: each.found.expected.mean).found
    first, effect = results.measured[0].found, results.left_out.effect
    named = "" if best is first else f"; {best.method.title} does best, with {best.expected.mean:.2f}"
    causal = (
        f"lowers a query's margin by {effect.difference.value:.2f} nats ({effect.difference.low:.2f} to "
        f"{effect.difference.high:.2f}) more than leaving out as many random ones"
        if effect.difference.low > 0
        else "does not lower a query's margin measurably more than leaving out as many random ones"
    )
    return (
        f"From one trained model, {first.method.title} predicts what retraining on random subsets does with an LDS of "
        f"{first.expected.mean:.2f} ({first.expected.low:.2f} to {first.expected.high:.2f}), where noise allows "
        f"{results.references.ceiling.value:.2f}{named}. Leaving out the {results.left_out.images} images that it "
        f"calls most helpful {causal}."
    )


def _method(results: Results) -> tuple[str, ...]:
    config, n = results.config, len(results.task.train.labels)
    method, evaluation = config.method, config.evaluation
    return (
        "Scores are −(1/n) ∇ℓᵀ (C + λI)⁻¹ ∇f at one model of all images, f the margin, with C the true Fisher matrix "
        "in EK-FAC's form, the Gauss-Newton matrix of "
        f"{min(method.curvature_examples, n):,} images (CG, {method.iterations} iterations at most), that of all "
        f"images on {max(1, method.arnoldi_steps // 2)} eigenvectors (Arnoldi), the mean of inverses (DataInf), or the "
        "empirical Fisher matrix of projected gradients (LoGra).",
        f"LDS: mean over {len(results.task.queries.labels)} queries of Spearman's ρ between summed scores and margins "
        "of retrained models; 95% bootstrap intervals over queries and models together. Expected: "
        f"{evaluation.subsets} random subsets of {report.percent(evaluation.alpha)} of {n:,} images, "
        f"{evaluation.seeds} seeds each, averaged. One run: {evaluation.fixed_subsets} repetitions without a random "
        f"{_left_out(results)}, initialisation and order unchanged.",
        f"Dampings were chosen on held-out models: {evaluation.held_out_subsets} subsets for the one, "
        f"{evaluation.fixed_held_out_subsets} repetitions for the other. Agreement: mean over queries of Spearman's ρ "
        "with the scores of CG. Seconds: gradients, curvature and scores for all dampings.",
        f"Counterfactual: {results.left_out.images} images for each of {results.left_out.queries} queries; retrained "
        "models share initialisation and order with the model of all images, and what is left out weighs nothing.",
    )


def _report(results: Results, pictures: dict[str, report.Picture], rows: tuple[plot.Attribution, ...]) -> report.Report:
    figure, references, effect = report.KeyFigure, results.references, results.left_out.effect
    first = results.measured[0].found
    difference = effect.difference
    intro = (
        "A positive score says that weight on the training image raises the query's margin. Helpful images look like "
        "the query and bear its label; harmful ones often look like it and bear another."
    )
    return report.Report(
        title="What would this model say without this image?",
        lead=_lead(results),
        headlines=(
            figure("LDS, expected", first.expected.mean, first.expected.low, first.expected.high, first.method.title),
            figure("LDS, one run", first.fixed.mean, first.fixed.low, first.fixed.high, first.method.title),
            figure("Margin lost", difference.value, difference.low, difference.high, "beyond random removal", "nats"),
        ),
        figures=(
            figure("Noise ceiling", references.ceiling.value, meaning="of the expected LDS"),
            figure("LDS of random scores, expected", *references.expected_chance, meaning="95% of draws lie between"),
            figure("LDS of random scores, one run", *references.fixed_chance, meaning="likewise"),
            figure("Queries that got worse", effect.fraction, meaning="more than without random images"),
            figure("Models trained", _models_trained(results), meaning="the one, truths and counterfactuals"),
        ),
        sections=(
            report.Section("What helped and what harmed", (intro, report.Gallery(rows))),
            report.Section("Are the attributions true?", (_table(results), pictures["predicted_actual"])),
            report.Section("Do they matter?", (pictures["counterfactual"],)),
            report.Section("How the damping was chosen", (pictures["lds_by_damping"],)),
        ),
        method=_method(results),
    )
