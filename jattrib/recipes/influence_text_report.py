"""What the influence recipe on a text shows: its figures, its pictures, passages shaded by their characters' scores."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jattrib.metrics.bootstrap import Interval
from jattrib.recipes import build, comparison_report, magic_text_report, plot, report, rundir
from jattrib.recipes.comparison_report import Drawn
from jattrib.recipes.experiment import FixedTruth, LeftOut, Task
from jattrib.recipes.influence_text_stages import Config, Measured, Setting, Tokens


class Results(NamedTuple):
    """What the stages found; the first attributor is the one whose passages are shown and left out."""

    config: Config
    task: Task
    setting: Setting
    measured: tuple[Measured, ...]
    tokens: Tokens
    truth: FixedTruth
    chance: Interval
    left_out: LeftOut


def write(directory: rundir.RunDir, results: Results) -> None:
    """Write pictures, report and summary into the run's directory."""
    pictures = {
        "lds": _lds_picture(results),
        "predicted_actual": _prediction_picture(results),
        "counterfactual": _counterfactual_picture(results),
    }
    for name, (figure, _, _) in pictures.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    shown = {name: report.picture(figure, alt=alt, caption=text) for name, (figure, alt, text) in pictures.items()}
    report.write(directory, _report(results, shown))
    rundir.finish(directory, _figures(results))


def _figures(results: Results) -> dict[str, float | int | str]:
    effect, method = results.left_out.effect, results.config.method
    protocol = f"lds_fixed_{comparison_report.percent(method.fraction)}"
    figures: dict[str, float | int | str] = {f"{protocol}_chance_high": results.chance.high}
    for each in results.measured:
        name = f"{protocol}_{each.name}"
        figures |= {name: each.found.mean, f"{name}_low": each.found.low, f"{name}_high": each.found.high}
        if each.damping is not None:
            figures[f"damping_{each.name}"] = each.damping
    return figures | {
        "likelihood_drop_helpful_millinats": 1e3 * effect.removed.value,
        "likelihood_drop_random_millinats": 1e3 * effect.random.value,
        "likelihood_drop_difference_millinats": 1e3 * effect.difference.value,
        "likelihood_drop_difference_millinats_low": 1e3 * effect.difference.low,
        "likelihood_drop_difference_millinats_high": 1e3 * effect.difference.high,
        "likelihood_drop_predicted_millinats": 1e3 * _predicted(results),
        "passages_left_out": results.left_out.images,
        "query_loss_nats_per_token": -float(results.setting.values.mean()),
        "queries": len(results.task.queries.labels),
        "sequences": len(results.task.train.labels),
        "models_trained": method.subsets + method.held_out_subsets + 2 * results.left_out.queries + 4,
        "strategy": results.task.members.strategy,
    }


def _predicted(results: Results) -> float:
    """Return the mean fall that the scores foretell of the removals that were carried out."""
    scores = np.sort(results.measured[0].scores[:, : results.left_out.queries], axis=0)
    return float(scores[-results.left_out.images :].sum(axis=0).mean())


def _lds_picture(results: Results) -> Drawn:
    values, low, high = (
        np.array([getattr(each.found, end) for each in results.measured]) for end in ("mean", "low", "high")
    )
    titles = [each.title for each in results.measured]
    part = _left_out(results)
    figure = plot.bar_with_interval(titles, values, low, high, labels=plot.Labels(f"LDS, one run without {part}", ""))
    points = ", ".join(f"{title} {value:.2f}" for title, value in zip(titles, values, strict=True))
    return (
        figure,
        f"Linear datamodeling score of each method: {points}.",
        f"How well summed scores rank what the very same run without a random {part} of the passages says of others: 1 "
        "is perfect. Bars are 95% intervals over queries and models.",
    )


def _left_out(results: Results) -> str:
    return report.percent(results.config.method.fraction)


def _prediction_picture(results: Results) -> Drawn:
    """The query whose own correlation is the median."""
    first, truth = results.measured[0], results.truth
    query = int(np.argsort(first.found.per_query)[len(first.found.per_query) // 2])
    predicted, actual = truth.whole[query] - (~truth.masks) @ first.scores[:, query], truth.outputs[:, query]
    rho = first.found.per_query[query]
    figure = plot.scatter_predicted_actual(
        predicted, actual, note=f"Spearman's ρ = {rho:.2f}",
        labels=plot.Labels("predicted log-likelihood (nats a character)", "that of the run without them"),
    )  # fmt: skip
    return (
        figure,
        f"Log-likelihood of one passage after {len(actual)} runs without random passages against the prediction: rank "
        f"correlation {rho:.2f}.",
        f"Each dot is the same run without another random {_left_out(results)} of the training passages: across, what "
        f"{first.title} predicts for one query (the median by correlation); up, what came out. Nothing is fitted but "
        "the dashed line.",
    )


def _counterfactual_picture(results: Results) -> Drawn:
    effect, count, first = results.left_out.effect, results.left_out.images, results.measured[0]
    both = (effect.removed, effect.random)
    values, low, high = (1e3 * np.array([getattr(each, end) for each in both]) for end in ("value", "low", "high"))
    figure = plot.bar_with_interval(
        ["most helpful left out", "random left out"], values, low, high,
        labels=plot.Labels("fall of the query's log-likelihood (thousandths of a nat a character)", ""),
    )  # fmt: skip
    return (
        figure,
        f"Mean fall of the log-likelihood: {values[0]:.1f} thousandths of a nat a character without the most helpful "
        f"passages, {values[1]:.1f} without random ones.",
        f"Without the {count} training passages that {first.title} calls most helpful for a query, and without {count} "
        f"random ones: {results.left_out.queries} queries, the same run each time but for what is left out.",
    )


def _passages(results: Results) -> report.Quotations:
    train, test = build.passages(results.config.data)
    scores, length, tokens = results.measured[0].scores, results.config.data.length, results.tokens
    most = float(np.quantile(np.abs(np.concatenate([tokens.of_helpful.ravel(), tokens.of_harmful.ravel()])), 0.99))
    rows = []
    for query in range(len(tokens.helpful.indices)):
        told = test[results.task.query_indices[query]]
        loss = f"{-results.setting.values[query]:.2f} nats a character"

        def quoted(index: int, parts: Float[np.ndarray, " t"], query: int = query) -> report.Quotation:
            plain = magic_text_report.quote(train[index], length, f"{1e6 * scores[index, query]:+.0f}")
            shades = parts[: min(length, len(train[index].text))] / (most or 1.0)
            return plain._replace(shades=tuple(shades.tolist()))

        helpful, harmful = (
            tuple(quoted(int(i), part) for i, part in zip(end.indices[query], parts[query], strict=True))
            for end, parts in ((tokens.helpful, tokens.of_helpful), (tokens.harmful, tokens.of_harmful))
        )
        rows.append((magic_text_report.quote(told, length, loss), helpful, harmful))
    return report.Quotations(
        tuple(rows),
        "Passages that were not trained on, with the training passages whose weight raises and lowers their likelihood "
        "most; scores in millionths of a nat a character. Each character is shaded by its own part of the score: blue "
        f"where learning to expect it helped, orange where it harmed. The model reads {length} characters.",
    )


def _lead(results: Results) -> str:
    first, effect = results.measured[0], results.left_out.effect
    best = max(results.measured, key=lambda each: each.found.mean)
    other = "" if best is first else f" ({best.title} does best, with {best.found.mean:.2f})"
    causal = (
        f"lowers its log-likelihood by {1e3 * effect.difference.value:.1f} thousandths of a nat a character "
        f"({1e3 * effect.difference.low:.1f} to {1e3 * effect.difference.high:.1f}) more than leaving out random ones"
        if effect.difference.low > 0
        else "does not lower its log-likelihood measurably more than leaving out random ones"
    )
    return (
        f"From the trained decoder alone, {first.title} predicts what this run does without a random "
        f"{_left_out(results)} of its passages with an LDS of {first.found.mean:.2f} ({first.found.low:.2f} to "
        f"{first.found.high:.2f}){other}. Leaving out the {results.left_out.images} passages that it calls most "
        f"helpful for a query {causal}."
    )


def _of(results: Results, name: str) -> tuple[float, float, float]:
    found = next(each.found for each in results.measured if each.name == name)
    return found.mean, found.low, found.high


def _report(results: Results, pictures: dict[str, report.Picture]) -> report.Report:
    config, task, figure = results.config, results.task, report.KeyFigure
    first, effect = results.measured[0], results.left_out.effect
    difference = (1e3 * effect.difference.value, 1e3 * effect.difference.low, 1e3 * effect.difference.high)
    dampings = ", ".join(f"{each.title} {each.damping:g}" for each in results.measured if each.damping is not None)
    return report.Report(
        title="Which passages, and which characters, taught it to expect this one?",
        lead=_lead(results),
        headlines=(
            figure("LDS", first.found.mean, first.found.low, first.found.high, first.title),
            figure("Shared trigrams", *_of(results, "similarity"), meaning="their LDS"),
            figure("Likelihood lost", *difference, meaning="beyond random removal, a character", unit="mnat"),
        ),
        figures=(
            *(figure(f"LDS, {each.title}", *_of(results, each.name))
              for each in results.measured[1:] if each.name != "similarity"),
            figure("LDS of random scores", *results.chance, meaning="95% of draws lie between"),
            figure("Fall that was foretold", 1e3 * _predicted(results), meaning="by the scores left out", unit="mnat"),
            figure("Fall", 1e3 * effect.removed.value, 1e3 * effect.removed.low, 1e3 * effect.removed.high,
                   "without the most helpful passages", "mnat"),
            figure("Loss of the queries", -float(results.setting.values.mean()), meaning="nats a character"),
        ),
        sections=(
            report.Section("Passages beside passages", (_passages(results),)),
            report.Section("Are the scores true?", (pictures["lds"], pictures["predicted_actual"])),
            report.Section("Do they matter?", (pictures["counterfactual"],)),
        ),
        method=(
            f"A decoder in the style of {config.model.style}, {config.model.layers} layers of width "
            f"{config.model.width}, learns {len(task.train.labels):,} passages character by character: "
            f"{report.counted(config.training.epochs, 'epoch')} of batches of {config.training.batch_size}. The output "
            "is a passage's mean log-likelihood a character. EK-FAC has every layer, embeddings included; LoGra the "
            f"linear layers, {config.method.rank} features a side, kept on disk. A character's part of a score is the "
            "derivative of its own loss along the query's direction: parts add up to the score.",
            f"LDS of the one run: mean over {len(task.queries.labels)} queries of Spearman's ρ between summed scores "
            f"and log-likelihoods over {config.method.subsets} random subsets; initialisation and order stay, and what "
            "is left out weighs nothing; 95% bootstrap intervals over queries and models together. Dampings were "
            f"chosen on {config.method.held_out_subsets} other subsets: {dampings}, in units of the mean eigenvalue.",
        ),
    )  # fmt: skip
