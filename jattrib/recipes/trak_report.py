"""What the TRAK recipe shows: its figures, its pictures, its report."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jattrib.data.vision import Dataset
from jattrib.metrics import lds
from jattrib.recipes import build, plot, report, rundir
from jattrib.recipes.experiment import LeftOut, Task, Truth
from jattrib.recipes.trak_stages import Choice, Config, Found

SHOWN = 12
"""Queries whose attributions are shown."""

NEIGHBOURS = 5
"""Training images shown on either side of a query."""

CHANCE = 0.025
"""Permuted models that reach the LDS: more of them, and it is no better than chance."""


class Results(NamedTuple):
    """What the stages found."""

    config: Config
    task: Task
    choice: Choice
    found: Found
    truth: Truth
    left_out: LeftOut


def write(directory: rundir.RunDir, results: Results) -> None:
    """Write pictures, report and summary into the run's directory."""
    pictures = {
        "lds_by_checkpoints": _lds_picture(results),
        "predicted_actual": _prediction_picture(results),
        "ridge": _ridge_picture(results),
        "counterfactual": _counterfactual_picture(results),
    }
    rows = gallery(results.config, results.task, results.found.scores)
    for name, (figure, _, _) in pictures.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    grid = plot.attribution_grid(rows, title="Training images that helped and harmed a prediction most")
    plot.save_png(grid, directory.path / "attributions.png")
    shown = {name: report.picture(figure, alt=alt, caption=text) for name, (figure, alt, text) in pictures.items()}
    report.write(directory, _report(results, shown, rows))
    rundir.finish(directory, _figures(results))


def _figures(results: Results) -> dict[str, float | int | str]:
    found, best, effect = results.found, results.found.by_checkpoints[-1], results.left_out.effect
    return {
        "lds_expected": best.mean,
        "lds_expected_low": best.low,
        "lds_expected_high": best.high,
        "lds_ceiling": found.ceiling.value,
        "lds_random": found.random.value,
        "lds_similarity": found.similarity.mean,
        "lds_null_high": found.null.high,
        "lds_p_value": found.null.p_value,
        **{
            f"lds_expected_{count}_checkpoints": each.mean
            for count, each in zip(found.counts, found.by_checkpoints, strict=True)
        },
        "checkpoints": found.counts[-1],
        "relative_damping": results.choice.best,
        "lds_held_out": max(results.choice.held_out),
        "constant_queries": len(best.constant_queries),
        "margin_drop_helpful_nats": effect.removed.value,
        "margin_drop_random_nats": effect.random.value,
        "margin_drop_difference_nats": effect.difference.value,
        "margin_drop_difference_nats_low": effect.difference.low,
        "margin_drop_difference_nats_high": effect.difference.high,
        "margin_drop_fraction_of_queries": effect.fraction,
        "images_left_out": results.left_out.images,
        "models_trained": _models_trained(results),
        "strategy": results.task.members.strategy,
    }


def _models_trained(results: Results) -> int:
    evaluation = results.config.evaluation
    retrained = (evaluation.subsets + evaluation.held_out_subsets) * evaluation.seeds
    return results.config.method.checkpoints + retrained + 2 * results.left_out.queries + 1


Drawn = tuple[plot.Figure, str, str]
"""A picture, what it shows in words, and what to see in it."""


def _lds_picture(results: Results) -> Drawn:
    found = results.found
    values, low, high = (
        np.array([getattr(each, end) for each in found.by_checkpoints]) for end in ("mean", "low", "high")
    )
    references = {
        "noise ceiling": found.ceiling.value,
        "cosine of pixels": found.similarity.mean,
        "random scores": found.random.value,
    }
    figure = plot.line_with_band(
        np.array(found.counts, float), values, low, high, labels=plot.Labels("checkpoints", "LDS"),
        references=references, log_x=True,
    )  # fmt: skip
    points = ", ".join(f"{value:.2f} at {count}" for count, value in zip(found.counts, values, strict=True))
    return (
        figure,
        f"Linear datamodeling score against the number of checkpoints: {points}.",
        "More independently trained checkpoints make better attributions. The band is the 95% interval over queries "
        "and models; on average nothing can score above the noise ceiling.",
    )


def _prediction_picture(results: Results) -> Drawn:
    """The query whose own correlation is the median: neither the best nor the worst."""
    best = results.found.by_checkpoints[-1]
    query = int(np.argsort(best.per_query)[len(best.per_query) // 2])
    predicted = lds.predict(results.found.scores, results.truth.masks)[:, query]
    actual = results.truth.outputs.mean(axis=1)[:, query]
    rho = best.per_query[query]
    label = results.task.classes[results.task.queries.labels[query]]
    figure = plot.scatter_predicted_actual(
        predicted, actual, labels=plot.Labels("sum of the subset's scores", "margin after retraining (nats)"),
        note=f"Spearman's ρ = {rho:.2f}",
    )  # fmt: skip
    return (
        figure,
        f"Margin of one query after retraining on {len(actual)} random subsets against the sum of the subset's scores: "
        f"rank correlation {rho:.2f}.",
        f"Each dot is a random subset of the training set: across, what TRAK predicts for one query (the median "
        f"query by correlation, class {label}); up, what the retrained models say. The LDS is the mean of ρ over "
        "all queries.",
    )


def _ridge_picture(results: Results) -> Drawn:
    choice = results.choice
    values = np.array(choice.held_out)
    names = [f"{damping:g} × mean eigenvalue" for damping in choice.dampings]
    figure = plot.bar_with_interval(
        names, values, values, values, labels=plot.Labels("LDS on held-out models", ""),
        strong=choice.dampings.index(choice.best),
    )  # fmt: skip
    return (
        figure,
        "LDS on held-out models for each ridge: "
        + ", ".join(f"{value:.3f} at {name}" for name, value in zip(names, values, strict=True)),
        f"The ridge ({choice.best:g} × the mean eigenvalue) was chosen on these models; every other figure is measured "
        "on models that had no part in the choice.",
    )


def _counterfactual_picture(results: Results) -> Drawn:
    effect, images = results.left_out.effect, results.left_out.images
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
        f"Without the {images} training images that TRAK calls most helpful for a query, its margin falls by "
        f"{values[0]:.2f} nats; without {images} random ones, by {values[1]:.2f}. {results.left_out.queries} queries, "
        "each with retrained models of its own.",
    )


def gallery(config: Any, task: Task, scores: Float[np.ndarray, "n q"]) -> tuple[plot.Attribution, ...]:
    """Return the images that helped and harmed queries most; queries are spread evenly over the test set's classes."""
    labels = task.queries.labels
    by_turn = sorted(
        range(len(labels)), key=lambda query: (int((labels[:query] == labels[query]).sum()), labels[query])
    )
    chosen = by_turn[: min(SHOWN, len(labels))]
    images = {"train": task.train, "query": task.queries}

    def thumbnail(kind: str, index: int, detail: str) -> plot.Thumbnail:
        dataset: Dataset = images[kind]
        pixels = build.to_images(config.data, dataset.inputs[index : index + 1])[0]
        return plot.Thumbnail(pixels, task.classes[dataset.labels[index]], detail)

    rows = []
    for query in chosen:
        order = np.argsort(scores[:, query])
        sides = (order[::-1][:NEIGHBOURS], order[:NEIGHBOURS])
        helpful, harmful = (tuple(thumbnail("train", int(i), f"#{i}") for i in side) for side in sides)
        rows.append(plot.Attribution(thumbnail("query", query, f"test #{task.query_indices[query]}"), helpful, harmful))
    return tuple(rows)


def _lead(results: Results) -> str:
    best, found, effect = results.found.by_checkpoints[-1], results.found, results.left_out.effect
    score = f"a linear datamodeling score of {best.mean:.2f} ({best.low:.2f} to {best.high:.2f})"
    if found.null.p_value > CHANCE:
        verdict = f"no better than chance, with {score}"
    elif best.mean <= found.similarity.mean:
        verdict = (
            f"better than chance but not than the cosine of pixels, with {score} against {found.similarity.mean:.2f}"
        )
    else:
        others = f"noise allows {found.ceiling.value:.2f} and the cosine of pixels gives {found.similarity.mean:.2f}"
        verdict = f"well, with {score} where {others}"
    images, fall = results.left_out.images, effect.difference
    causal = (
        f"lowers a query's margin by {fall.value:.2f} nats ({fall.low:.2f} to {fall.high:.2f}) more than leaving out"
        if fall.low > 0
        else f"does not lower a query's margin measurably more ({fall.low:.2f} to {fall.high:.2f}) than leaving out"
    )
    return (
        f"TRAK with {report.counted(found.counts[-1], 'checkpoint')} predicts retrained models {verdict}. "
        f"Leaving out the {images} images that it calls most helpful {causal} {images} random ones."
    )


def _headlines(results: Results) -> tuple[report.KeyFigure, ...]:
    best, difference = results.found.by_checkpoints[-1], results.left_out.effect.difference
    return (
        report.KeyFigure("LDS", best.mean, best.low, best.high, report.counted(results.found.counts[-1], "checkpoint")),
        report.KeyFigure("Noise ceiling", results.found.ceiling.value, meaning="what perfect scores would reach"),
        report.KeyFigure(
            "Margin lost", difference.value, difference.low, difference.high, "beyond random removal", "nats"
        ),
    )


def _key_figures(results: Results) -> tuple[report.KeyFigure, ...]:
    found, first = results.found, results.found.by_checkpoints[0]
    similar, random = found.similarity, found.random
    figure = report.KeyFigure
    return (
        figure("LDS, one checkpoint", first.mean, first.low, first.high, "the cheapest TRAK"),
        figure(
            "LDS, cosine of pixels", similar.mean, similar.low, similar.high, "positive within a class, else negative"
        ),
        figure("LDS, random scores", random.value, random.low, random.high, "should be near 0"),
        figure(
            "LDS, models permuted", found.null.mean, found.null.low, found.null.high, "chance, all queries together"
        ),
        figure("Seed-to-seed correlation", found.ceiling.correlation, meaning="of which the noise ceiling is made"),
        figure(
            "Ridge", f"{results.choice.best:g}", meaning="in units of the mean eigenvalue; chosen on held-out models"
        ),
        figure("Queries that got worse", results.left_out.effect.fraction, meaning="more than without random images"),
        figure(
            "Constant queries",
            len(found.by_checkpoints[-1].constant_queries),
            meaning="no rank correlation; not in the mean",
        ),
        figure("Models trained", _models_trained(results), meaning="checkpoints, ground truth and counterfactuals"),
    )


def _method(results: Results) -> tuple[str, ...]:
    config, task = results.config, results.task
    method, evaluation = config.method, config.evaluation
    measured = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in task.measured.items())
    why = f"the fastest of a short measurement ({measured})" if measured else "as the configuration says"
    return (
        f"{report.counted(method.checkpoints, 'checkpoint')}, each trained on a random "
        f"{report.percent(evaluation.alpha)} of {len(task.train.labels):,} images. The gradients of margins are "
        f"projected to {method.dim:,} features ({method.projection}); checkpoints are combined as "
        f"{method.combination.replace('_', ' ')}.",
        f"LDS: mean over {len(task.queries.labels)} queries of Spearman's ρ between summed scores and expected margins "
        f"over {evaluation.subsets} random subsets, {evaluation.seeds} seeds each; 95% bootstrap intervals over "
        "queries and models together. The ridge was chosen on other models.",
        f"Counterfactual: retrained models share initialisation and order with the model of all images, and what is "
        f"left out weighs nothing. {results.left_out.images} images for each of {results.left_out.queries} queries.",
        f"Models are trained {task.members.width} at a time by the strategy {task.members.strategy}, {why}.",
    )


def _report(results: Results, pictures: dict[str, report.Picture], rows: tuple[plot.Attribution, ...]) -> report.Report:
    intro = (
        "A positive score says that weight on the training image raises the query's margin. Helpful images look like "
        "the query and bear its label; harmful ones often look like it and bear another."
    )
    return report.Report(
        title="Which training images made this prediction?",
        lead=_lead(results),
        headlines=_headlines(results),
        figures=_key_figures(results),
        sections=(
            report.Section("What helped and what harmed", (intro, report.Gallery(rows))),
            report.Section(
                "Are the attributions true?", (pictures["lds_by_checkpoints"], pictures["predicted_actual"])
            ),
            report.Section("Do they matter?", (pictures["counterfactual"],)),
            report.Section("How the ridge was chosen", (pictures["ridge"],)),
        ),
        method=_method(results),
    )
