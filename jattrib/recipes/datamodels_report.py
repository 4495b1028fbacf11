"""What the datamodels recipe shows: its figures, its pictures, its report."""

from typing import NamedTuple

import numpy as np

from jattrib.metrics import lds
from jattrib.recipes import plot, report, rundir
from jattrib.recipes.datamodels_stages import METHODS, Config, Found
from jattrib.recipes.experiment import Task, Truth

PICTURES = {
    "lds_by_models": ("trak", "lasso", "guided"),
    "lds_of_regressions": ("lasso", "ridge", "difference"),
}
"""Pictures of the LDS against the number of models, and the methods in each."""


class Results(NamedTuple):
    """What the stages found."""

    config: Config
    task: Task
    found: Found
    truth: Truth


def write(directory: rundir.RunDir, results: Results) -> None:
    """Write pictures, report and summary into the run's directory."""
    drawn = {name: _lds_picture(results, names) for name, names in PICTURES.items()}
    drawn["predicted_actual"] = _prediction_picture(results)
    for name, (figure, _, _) in drawn.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    shown = {name: report.picture(figure, alt=alt, caption=text) for name, (figure, alt, text) in drawn.items()}
    report.write(directory, _report(results, shown))
    rundir.finish(directory, _figures(results))


def _figures(results: Results) -> dict[str, float | int | str]:
    found, models = results.found, results.config.method.models
    last = found.measured["lasso"][-1]
    figures: dict[str, float | int | str] = {
        "lds_expected": last.mean,
        "lds_expected_low": last.low,
        "lds_expected_high": last.high,
        "lds_expected_of": f"lasso_{models[-1]}_models",
    }
    for name in METHODS:
        for count, each in zip(models, found.measured[name], strict=True):
            figures |= {
                f"lds_{name}_{count}_models": each.mean,
                f"lds_{name}_{count}_models_low": each.low,
                f"lds_{name}_{count}_models_high": each.high,
            }
    for name, gains in found.gains.items():
        for count, each in zip(models, gains, strict=True):
            figures |= {
                f"lds_gain_over_{name}_{count}_models": each.value,
                f"lds_gain_over_{name}_{count}_models_low": each.low,
                f"lds_gain_over_{name}_{count}_models_high": each.high,
            }
    for count, checkpoints, each in zip(models, results.config.method.checkpoints_of, found.scored, strict=True):
        figures |= {
            f"trak_checkpoints_{count}_models": checkpoints,
            f"trak_damping_{count}_models": each.damping,
            f"difference_threshold_{count}_models": each.threshold,
            f"lasso_sources_{count}_models": each.sources,
            f"guided_prior_share_{count}_models": each.prior_weight,
        }
    return figures | {
        "lds_ceiling": found.ceiling.value,
        "lds_random": found.random.value,
        "lds_similarity": found.similarity.mean,
        "constant_queries": len(last.constant_queries),
        "models_trained": _models_trained(results),
        "strategy": results.task.members.strategy,
    }


def _models_trained(results: Results) -> int:
    evaluation, method = results.config.evaluation, results.config.method
    return method.models[-1] + method.checkpoints + evaluation.subsets * evaluation.seeds


Drawn = tuple[plot.Figure, str, str]
"""A picture, what it shows in words, and what to see in it."""


def _lds_picture(results: Results, names: tuple[str, ...]) -> Drawn:
    found, models = results.found, results.config.method.models
    values, low, high = (
        np.array([[getattr(each, end) for each in found.measured[name]] for name in names])
        for end in ("mean", "low", "high")
    )
    figure = plot.line_with_band(
        np.array(models, float), values, low, high, labels=plot.Labels("models trained", "LDS"),
        names=[METHODS[name] for name in names],
        references={"noise ceiling": found.ceiling.value, "cosine of pixels": found.similarity.mean}, log_x=True,
    )  # fmt: skip
    ends = ", ".join(f"{METHODS[name]} {row[-1]:.2f}" for name, row in zip(names, values, strict=True))
    return (
        figure,
        f"Linear datamodeling score against the number of models; with {models[-1]:,}: {ends}.",
        "All methods are given the same models and held against the same others. Bands are 95% intervals over queries "
        "and models together; on average nothing can score above the noise ceiling.",
    )


def _prediction_picture(results: Results) -> Drawn:
    """The query whose own correlation is the median: neither the best nor the worst."""
    best = results.found.measured["guided"][-1]
    query = int(np.argsort(best.per_query)[len(best.per_query) // 2])
    predicted = lds.predict(results.found.scored[-1].scores["guided"], results.truth.masks)[:, query]
    actual = results.truth.outputs.mean(axis=1)[:, query]
    rho = best.per_query[query]
    figure = plot.scatter_predicted_actual(
        predicted, actual, labels=plot.Labels("sum of the subset's scores", "margin after retraining (nats)"),
        note=f"Spearman's ρ = {rho:.2f}",
    )  # fmt: skip
    return (
        figure,
        f"Margin of one query after retraining on {len(actual)} random subsets against the sum of the subset's scores: "
        f"rank correlation {rho:.2f}.",
        "Each dot is a random subset of the training set: across, what ridge with TRAK as its prior predicts for one "
        "query (the median query by correlation); up, what the retrained models say.",
    )


def _lead(results: Results) -> str:
    found, method = results.found, results.config.method
    guided, gains = found.measured["guided"], found.gains
    rivals = [name for name in METHODS if name != "guided"]
    best = [
        max(rivals, key=lambda name, step=step: found.measured[name][step].mean) for step in range(len(method.models))
    ]
    ahead = [count for step, count in enumerate(method.models) if gains[best[step]][step].low > 0]
    last = best[-1]
    verdict = (
        f"better than every other method, beyond the interval, with {', '.join(f'{count:,}' for count in ahead)} models"
        if ahead
        else "not measurably better than the best of the others at any number of models"
    )
    return (
        f"With {method.models[-1]:,} models, ridge with TRAK as its prior has an LDS of {guided[-1].mean:.2f} "
        f"({guided[-1].low:.2f} to {guided[-1].high:.2f}), {METHODS[last]} {found.measured[last][-1].mean:.2f}, where "
        f"noise allows {found.ceiling.value:.2f}. The combination is {verdict}."
    )


def _headlines(results: Results) -> tuple[report.KeyFigure, ...]:
    found, models = results.found, results.config.method.models
    rows = [(METHODS[name], found.measured[name][-1]) for name in ("guided", "trak", "lasso")]
    return tuple(
        report.KeyFigure(f"LDS, {name}", each.mean, each.low, each.high, f"{models[-1]:,} models")
        for name, each in rows
    )


def _table(results: Results) -> report.Listing:
    found, models = results.found, results.config.method.models
    rows = []
    for name, title in METHODS.items():
        cells = [f"{each.mean:.3f} ({each.low:.3f} to {each.high:.3f})" for each in found.measured[name]]
        rows.append((title, *cells))
    for name, gains in found.gains.items():
        cells = [f"{each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f})" for each in gains]
        rows.append((f"combination less {METHODS[name]}", *cells))
    return report.Listing(
        ("method", *(f"{count:,} models" for count in models)), tuple(rows),
        "LDS of every method, and by how much the combination exceeds it, with 95% intervals.",
    )  # fmt: skip


def _method(results: Results) -> tuple[str, ...]:
    config, task, found = results.config, results.task, results.found
    method, evaluation = config.method, config.evaluation
    checkpoints = ", ".join(map(str, method.checkpoints_of))
    thresholds = ", ".join(f"{each.threshold:g}" for each in found.scored)
    sources = ", ".join(f"{each.sources:.0f}" for each in found.scored)
    return (
        f"Models are trained on random {report.percent(evaluation.alpha)} of {len(task.train.labels):,} images. The "
        f"LASSO's penalty is chosen for each query on {report.percent(method.held_out_fraction)} of the models and all "
        f"are then fitted; it uses {sources} images a query on average. Ridge is chosen by leaving out each model in "
        "turn.",
        f"Difference of means: the mean margin of models with an image less that of models without, 0 where it is "
        f"within {thresholds} standard errors; the threshold is chosen on the LASSO's held-out models.",
        f"TRAK has the gradients of {checkpoints} of the models, {method.dim:,} features each; its ridge is chosen on "
        "the others. The combination is a ridge regression of margins on TRAK's prediction, whose coefficient is free, "
        "and on the images.",
        f"LDS: mean over {len(task.queries.labels)} queries of Spearman's ρ between summed scores and expected margins "
        f"over {evaluation.subsets} other random subsets, {evaluation.seeds} seeds each, which nothing was chosen on.",
    )


def _report(results: Results, pictures: dict[str, report.Picture]) -> report.Report:
    found, figure = results.found, report.KeyFigure
    return report.Report(
        title="How many models does an attribution need?",
        lead=_lead(results),
        headlines=_headlines(results),
        figures=(
            figure("Noise ceiling", found.ceiling.value, meaning="what perfect scores would reach"),
            figure("LDS, cosine of pixels", found.similarity.mean, found.similarity.low, found.similarity.high),
            figure("LDS, random scores", found.random.value, found.random.low, found.random.high, "should be near 0"),
            figure("Models trained", _models_trained(results), meaning="to regress on, for gradients, as ground truth"),
        ),
        sections=(
            report.Section("Gradients, regressions, and both", (pictures["lds_by_models"], _table(results))),
            report.Section("Which regression?", (pictures["lds_of_regressions"],)),
            report.Section("What the scores predict", (pictures["predicted_actual"],)),
        ),
        method=_method(results),
    )
