"""What the MAGIC recipe on a text shows: its figures, its pictures, passages beside passages."""

from typing import Any, NamedTuple

import numpy as np

from jattrib.data.corpus import Passage
from jattrib.metrics import lds
from jattrib.recipes import build, magic_report, plot, report, rundir
from jattrib.recipes.experiment import FixedTruth, Task
from jattrib.recipes.magic_stages import Cost, Found

SHOWN = 6
"""Queries whose attributions are shown."""

NEIGHBOURS = 3
"""Training passages shown on either side."""


class Fidelity(NamedTuple):
    """The LDS of the one run, that of shared trigrams, and the relative error of predicted changes."""

    fixed: lds.LDS
    similarity: lds.LDS
    error: float


class Results(NamedTuple):
    """What the stages found; `config` is the recipe's."""

    config: Any
    task: Task
    found: Found
    truths: tuple[FixedTruth, ...]
    fidelity: tuple[Fidelity, ...]
    cost: Cost


def write(directory: rundir.RunDir, results: Results) -> None:
    """Write pictures, report and summary into the run's directory."""
    pictures = {"predicted_actual": _prediction_picture(results), "score_spread": _spread_picture(results)}
    for name, (figure, _, _) in pictures.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    shown = [report.picture(figure, alt=alt, caption=text) for figure, alt, text in pictures.values()]
    report.write(directory, _report(results, shown))
    rundir.finish(directory, _figures(results))


def _figures(results: Results) -> dict[str, float | int | str]:
    figures: dict[str, float | int | str] = {}
    for fraction, found in zip(results.config.method.fractions, results.fidelity, strict=True):
        name = magic_report.percent(fraction)
        figures |= {
            f"lds_fixed_{name}": found.fixed.mean,
            f"lds_fixed_{name}_low": found.fixed.low,
            f"lds_fixed_{name}_high": found.fixed.high,
            f"lds_fixed_similarity_{name}": found.similarity.mean,
            f"relative_error_{name}": found.error,
        }
    cost, info = results.cost, results.found.info
    return figures | {
        "metasmoothness": info.metasmoothness,
        "derivative_growth": info.growth,
        "query_loss_nats_per_token": -float(np.mean(info.values)),
        f"trainings_per_{cost.queries}_queries": cost.metagradient / cost.training,
        "queries": len(results.task.queries.labels),
        "sequences": len(results.task.train.labels),
        "models_trained": sum(len(truth.masks) + 1 for truth in results.truths),
        "strategy": results.task.members.strategy,
    }


def _prediction_picture(results: Results) -> tuple[plot.Figure, str, str]:
    found, truth = results.fidelity[0].fixed, results.truths[0]
    query = int(np.argsort(found.per_query)[len(found.per_query) // 2])
    predicted = truth.whole[query] - (~truth.masks) @ results.found.scores[:, query]
    rho, fraction = found.per_query[query], results.config.method.fractions[0]
    figure = plot.scatter_predicted_actual(
        predicted, truth.outputs[:, query],
        labels=plot.Labels("predicted log-likelihood (nats a character)", "that of the run without them"),
        note=f"Spearman's ρ = {rho:.3f}",
    )  # fmt: skip
    return (
        figure,
        f"Log-likelihood of one passage after the run without {report.percent(fraction)} of the passages against the "
        f"prediction: rank correlation {rho:.3f}.",
        f"Each dot is the same run without another random {report.percent(fraction)} of the training passages. Nothing "
        "is fitted but the dashed line. The passage is the median by correlation.",
    )


def _spread_picture(results: Results) -> tuple[plot.Figure, str, str]:
    scores = 1e6 * results.found.scores.ravel()
    figure = plot.histogram(scores, labels=plot.Labels("score (millionths of a nat a character)", "pairs"), bins=60)
    share = float(np.mean(scores > 0))
    return (
        figure,
        f"How scores are spread over all pairs of training passage and query: {share:.0%} are positive.",
        "Most passages teach the language as a whole and help a little; the tails are what the next section quotes.",
    )


def _passages(results: Results) -> report.Quotations:
    train, test = build.passages(results.config.data)
    scores, length = results.found.scores, results.config.data.length
    rows = []
    for query in range(min(SHOWN, scores.shape[1])):
        order = np.argsort(-scores[:, query], kind="stable")
        told = test[results.task.query_indices[query]]
        helpful, harmful = (
            tuple(quote(train[i], length, f"{1e6 * scores[i, query]:+.1f}") for i in part)
            for part in (order[:NEIGHBOURS], order[::-1][:NEIGHBOURS])
        )
        loss = f"{-results.found.info.values[query]:.2f} nats a character"
        rows.append((quote(told, length, loss), helpful, harmful))
    return report.Quotations(
        tuple(rows),
        f"Passages that were not trained on, with the training passages whose weight raises and lowers their "
        f"likelihood most; scores in millionths of a nat a character. The model reads the first {length} characters.",
    )


def quote(passage: Passage, length: int, detail: str) -> report.Quotation:
    """Return a passage, cut to what the model reads, with a few words more."""
    cut = passage.text[:length].rstrip() + " …" if len(passage.text) > length else passage.text
    return report.Quotation(passage.name, cut, detail)


def _report(results: Results, pictures: list[report.Picture]) -> report.Report:
    config, task, cost = results.config, results.task, results.cost
    found, fraction, info = results.fidelity[0], config.method.fractions[0], results.found.info
    fixed, figure = found.fixed, report.KeyFigure
    ratio = cost.metagradient / cost.training
    return report.Report(
        title="Which passages taught it to expect this one?",
        lead=f"The scores predict what this very run does without a random {report.percent(fraction)} of its "
        f"{len(task.train.labels):,} passages with a linear "
        f"datamodeling score of {fixed.mean:.3f} ({fixed.low:.3f} to {fixed.high:.3f}).",
        headlines=(
            figure(
                f"LDS, {report.percent(fraction)} left out", fixed.mean, fixed.low, fixed.high, "seed and order fixed"
            ),
            figure("Shared trigrams", found.similarity.mean, found.similarity.low, found.similarity.high, "their LDS"),
            figure("Metasmoothness", info.metasmoothness, meaning="1 is smooth"),
        ),
        figures=(
            figure("Relative error of predicted changes", found.error, meaning="1 is that of predicting none"),
            figure("Loss of the queries", -float(np.mean(info.values)), meaning="nats a character"),
            figure(
                f"Trainings for {report.counted(cost.queries, 'query')}", ratio, meaning="one replay for all of them"
            ),
            figure("Growth of the derivative", info.growth, meaning="towards the start of training"),
        ),
        sections=(
            report.Section("Are the scores true?", (pictures[0],)),
            report.Section("Passages beside passages", (_passages(results), pictures[1])),
        ),
        method=(
            f"A decoder in the style of {config.model.style}, {config.model.layers} layers of width "
            f"{config.model.width}, learns passages character by character: "
            f"{report.counted(config.training.epochs, 'epoch')} of batches of {config.training.batch_size}. The output "
            "is a passage's mean log-likelihood a character; its metagradient is exact reverse-mode differentiation "
            "through all steps.",
            f"LDS of the one run: {config.method.subsets} random subsets; initialisation and order stay, and what is "
            "left out weighs nothing. Mean over queries of Spearman's ρ, 95% bootstrap interval over queries and "
            "models together.",
            "Cost: seconds of a metagradient over seconds of the same training, on the first "
            f"{config.method.cost_steps} steps, both compiled, on {rundir.device()}.",
        ),
    )
