"""What the unlearning recipe shows: its figures, its pictures, its report."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jattrib.recipes import plot, report, rundir
from jattrib.recipes.dmm_attributions import attributions
from jattrib.recipes.dmm_measures import Measured, Measures
from jattrib.recipes.dmm_methods import TRIALS
from jattrib.recipes.dmm_stages import SETS, Config, Setup
from jattrib.recipes.dmm_tuning import Results


class Everything(NamedTuple):
    """What the stages found."""

    config: Config
    setup: Setup
    results: dict[str, Results]
    measures: dict[str, Measures]
    paths: dict[str, Float[np.ndarray, " steps"]]


Drawn = tuple[plot.Figure, str, str]
"""A picture, what it shows in words, and what to see in it."""


def write(directory: rundir.RunDir, found: Everything) -> None:
    """Write pictures, report and summary into the run's directory."""
    drawn = {f"klom_by_compute_{name}": _compute_picture(found, name) for name in SETS}
    drawn |= {f"margins_{name}": _margins_picture(found, name) for name in SETS}
    drawn["klom_by_prediction"] = _prediction_picture(found)
    drawn["ridge"] = _ridge_picture(found)
    for name, (figure, _, _) in drawn.items():
        plot.save_png(figure, directory.path / f"{name}.png")
    shown = {name: report.picture(figure, alt=alt, caption=text) for name, (figure, alt, text) in drawn.items()}
    report.write(directory, _report(found, shown))
    rundir.finish(directory, figures(found))


def baselines(found: Everything, name: str) -> dict[str, Measured]:
    """Return the figures of the methods that know no attribution and retrain nothing."""
    return {
        key: each
        for key, each in found.measures[name].methods.items()
        if not key.startswith(("dmm_", "direct_")) and key != "short"
    }


def best_baseline(found: Everything, name: str) -> str:
    """Return the baseline of lowest KLoM: on the evaluation oracles, so in the baselines' favour."""
    return min(baselines(found, name), key=lambda key: baselines(found, name)[key].klom.value)


def _excess(found: Everything, name: str, key: str) -> float:
    measures = found.measures[name]
    return measures.methods[key].klom.value - measures.floor.klom.value


def _ratio(found: Everything, name: str) -> float | None:
    """Return how many times farther from the floor the best baseline is; None where either of the two is not above."""
    best, dmm = (_excess(found, name, key) for key in (best_baseline(found, name), _best_matched(found, name)))
    return best / dmm if min(best, dmm) > 0 else None


def figures(found: Everything) -> dict[str, float | int | str]:
    """Return the summary's figures."""
    method, shown = found.config.method, {}
    for name, measures in found.measures.items():
        for key, each in (measures.methods | {"floor": measures.floor}).items():
            stem = f"klom_p95_{name}_{key}"
            shown |= {stem: each.klom.value, f"{stem}_low": each.klom.low, f"{stem}_high": each.klom.high}
            shown |= {f"{stem}_{part}": value for part, value in each.parts.items()}
            shown |= {f"klom_gaussian_p95_{name}_{key}": each.gaussian, f"ulira_{name}_{key}": each.attack}
        for key, each in found.results[name].unlearned.items():
            shown |= {f"compute_{name}_{key}": each.compute, f"prepared_trainings_{name}_{key}": each.prepared}
            if each.trial >= 0:
                shown[f"trial_{name}_{key}"] = each.trial
        for key, effect in (measures.effects | {"ceiling": measures.ceiling}).items():
            stem = f"group_lds_{name}_{key}"
            shown |= {stem: effect.value, f"{stem}_low": effect.low, f"{stem}_high": effect.high}
        for key, each in found.results[name].predicted.items():
            stem = f"multiplier_{name}_{key}"
            shown |= dict(zip((f"{stem}_forget", f"{stem}_elsewhere"), each.multipliers, strict=True))
            shown[f"choice_{name}_{key}"] = each.choice
        best, dmm = best_baseline(found, name), _best_matched(found, name)
        shown |= {
            f"klom_p95_{name}_simulated_floor": measures.bias,
            f"best_baseline_{name}": best,
            f"dmm_{name}": dmm,
        }
        ratio = _ratio(found, name)
        shown |= {} if ratio is None else {f"excess_ratio_{name}": ratio}
    for key, path in found.paths.items():
        reached = np.flatnonzero(path <= 1e-6)
        shown[f"ridge_steps_{key.replace(' ', '_')}"] = int(reached[0]) if len(reached) else -1
    return shown | {
        "models": method.models,
        "oracles": method.oracles,
        "models_trained": _trained(found),
        "strategy": found.setup.task.members.strategy,
    }


def _best_matched(found: Everything, name: str) -> str:
    """Return the variant of Datamodel Matching that was best on the tuning oracles."""
    matched = {key: each for key, each in found.results[name].unlearned.items() if key.startswith("dmm_")}
    cheap = {key: each for key, each in matched.items() if each.compute <= found.config.method.compute * 1.01}
    return min(cheap or matched, key=lambda key: min(matched[key].values))


def _trained(found: Everything) -> int:
    method = found.config.method
    each = method.oracles + method.retrained + method.paired_models
    return method.models + len(SETS) * each + method.subset_models + method.trak_models


def _compute_picture(found: Everything, name: str) -> Drawn:
    measures, unlearned = found.measures[name], found.results[name].unlearned
    keys = list(measures.methods)
    value, low, high = (
        np.array([getattr(measures.methods[key].klom, end) for key in keys]) for end in ("value", "low", "high")
    )
    matched, direct = (np.array([key.startswith(kind) for key in keys]) for kind in ("dmm_", "direct_"))
    figure = plot.ranked_points(
        [_short_title(unlearned[key].title) for key in keys], value, np.minimum(low, value), np.maximum(high, value),
        notes=("compute", [f"{unlearned[key].compute:.2g}" for key in keys]),
        groups={"DMM": matched, "DM-direct": direct, "baselines": ~matched & ~direct},
        references={"retrained": measures.floor.klom.value},
        labels=plot.Labels("KLoM (nats)", ""),
    )  # fmt: skip
    best, dmm = best_baseline(found, name), _best_matched(found, name)
    return (
        figure,
        f"KLoM and compute after forgetting {SETS[name]}: {unlearned[dmm].title} "
        f"{measures.methods[dmm].klom.value:.2f}, {unlearned[best].title} {measures.methods[best].klom.value:.2f}, "
        f"retrained models {measures.floor.klom.value:.2f}.",
        f"Forgetting {SETS[name]}. Lower is better; the dashed line is where retrained models are. KLoM is the mean of "
        "its 95th percentiles over forgotten, retained and validation images. Compute is a part of one retraining; "
        "what subset models took before the forget set was known is not counted in it; that is in the table.",
    )


def _short_title(title: str) -> str:
    return title.replace("DM-direct, ", "direct: ").replace("DMM, ", "DMM: ")


def _margins_picture(found: Everything, name: str) -> Drawn:
    """Three forgotten images: where models differ most from oracles, at the median, and in between."""
    results, dmm = found.results[name], _best_matched(found, name)
    forget = results.parts["forget"]
    gap = np.abs(results.full[:, forget].mean(axis=0) - results.oracles[:, forget].mean(axis=0))
    order = np.argsort(gap)
    chosen = [int(order[round(part * (len(order) - 1))]) for part in (1.0, 0.75, 0.5)]
    classes, labels = found.setup.task.classes, found.setup.labels
    indices = found.setup.problems[name].forget
    panels = []
    for at in chosen:
        samples = {
            "trained": results.full[:, forget[at]],
            "retrained without it": results.oracles[:, forget[at]],
            "unlearned": results.unlearned[dmm].margins[:, forget[at]],
        }
        panels.append((f"{classes[labels[indices[at]]]} (number {indices[at]})", samples))
    figure = plot.overlaid_histograms(panels, labels=plot.Labels("margin (nats)", "models"))
    return (
        figure,
        f"Margins of three forgotten images over {len(results.full)} models before unlearning, after it by "
        f"{results.unlearned[dmm].title}, and of retrained models.",
        f"Forgetting {SETS[name]}: the image whose margin retraining changes most, one of the upper quarter, and the "
        f"median. Unlearned by {results.unlearned[dmm].title}.",
    )


def _prediction_picture(found: Everything) -> Drawn:
    names, x, value, low, high = [], [], [], [], []
    for name, measures in found.measures.items():
        for key, effect in measures.effects.items():
            klom = measures.methods[f"dmm_{key}"].klom
            names.append(f"{key}, {name}")
            x.append(effect.value)
            value.append(klom.value)
            low.append(min(klom.low, klom.value))
            high.append(max(klom.high, klom.value))
    figure = plot.named_points(
        *map(np.array, (x, value, low, high)), names=names, log_x=False,
        labels=plot.Labels("group LDS of the predicted change", "KLoM after DMM (nats)"),
    )  # fmt: skip
    rho = np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(value)))[0, 1]
    return (
        figure,
        f"KLoM after Datamodel Matching against the group LDS of the attribution that it matched: rank correlation "
        f"{rho:.2f}.",
        "Every attribution on every forget set. Group LDS: Spearman's ρ over images between the predicted and the "
        "measured change of the mean margin, mean over forgotten, retained and validation images.",
    )


def _ridge_picture(found: Everything) -> Drawn:
    steps = len(next(iter(found.paths.values()))) - 1
    at = np.unique(np.linspace(0, steps, 40).astype(int))
    values = np.log10(np.clip(np.array([path[at] for path in found.paths.values()]), 1e-16, 1e3))
    figure = plot.line_with_band(
        at.astype(float), values, values, values, names=list(found.paths),
        labels=plot.Labels("gradient steps", "log₁₀ of the relative distance"),
    )  # fmt: skip
    ours = found.paths["oracle matching"]
    reached = int(np.flatnonzero(ours <= 1e-6)[0]) if (ours <= 1e-6).any() else -1
    return (
        figure,
        f"Distance to the retrained ridge regression against gradient steps: oracle matching is within 1e-6 after "
        f"{reached} steps.",
        "Ridge regression, where everything is known. The forget set spans directions in which the rest hardly varies: "
        "descent on the rest is slow there, and matching outputs on a set that holds the forget set is not.",
    )


def _table(found: Everything, name: str) -> report.Listing:
    measures, rows = found.measures[name], []
    for key, each in measures.methods.items():
        unlearned = found.results[name].unlearned[key]
        rows.append((unlearned.title, *_cells(each), f"{unlearned.compute:.3f}", f"{unlearned.prepared:.0f}"))
    rows.sort(key=lambda row: float(row[1].split()[0]))
    rows.insert(0, ("retrained models", *_cells(measures.floor), "1", "0"))
    return report.Listing(
        ("method", "KLoM", "forgotten", "retained", "validation", "U-LiRA", "compute", "prepared"), tuple(rows),
        f"Forgetting {SETS[name]}. KLoM in nats: the mean of the 95th percentiles of the three parts with its 95% "
        "interval, and each of them. U-LiRA: balanced accuracy on forgotten images, ½ is ideal. Compute: of one model, "
        "as a part of one retraining. Prepared: trainings before the forget set is known.",
    )  # fmt: skip


def _cells(each: Measured) -> tuple[str, ...]:
    return (
        f"{each.klom.value:.2f} ({each.klom.low:.2f} to {each.klom.high:.2f})",
        *(f"{value:.2f}" for value in each.parts.values()),
        f"{each.attack:.2f}",
    )


def _effects_table(found: Everything) -> report.Listing:
    titles = {key: each.title for key, each in attributions(found.config).items()} | {"ceiling": "retrained models"}
    rows = []
    for key, title in titles.items():
        cells = []
        for measures in found.measures.values():
            each = (measures.effects | {"ceiling": measures.ceiling})[key]
            cells.append(f"{each.value:.2f} ({each.low:.2f} to {each.high:.2f})")
        rows.append((title, *cells))
    return report.Listing(("attribution", *SETS.values()), tuple(rows), "Group LDS, with its 95% interval over models.")


def _lead(found: Everything) -> str:
    parts = []
    for name, measures in found.measures.items():
        best, dmm = best_baseline(found, name), _best_matched(found, name)
        ours, other = (measures.methods[key].klom for key in (dmm, best))
        apart = "" if ours.high < other.low else ", intervals overlapping"
        parts.append(f"{SETS[name]}: {ours.value:.2f} against {other.value:.2f}{apart}, "
                     f"where retraining has {measures.floor.klom.value:.2f}")  # fmt: skip
    return f"KLoM of Datamodel Matching against that of the best baseline, forgetting {'; '.join(parts)}."


def _report(found: Everything, pictures: dict[str, report.Picture]) -> report.Report:
    figure, headlines = report.KeyFigure, []
    for name, measures in found.measures.items():
        each = measures.methods[_best_matched(found, name)].klom
        headlines.append(
            figure(f"KLoM, {SETS[name]}", each.value, each.low, each.high, f"{measures.floor.klom.value:.2f} retrained")
        )
    return report.Report(
        title="Can unlearned models be told from retrained ones?",
        lead=_lead(found),
        headlines=tuple(headlines),
        figures=tuple(_ratio_figure(found, name) for name in SETS),
        sections=(
            *(
                report.Section(
                    f"Forgetting {SETS[name]}",
                    (pictures[f"klom_by_compute_{name}"], _table(found, name), pictures[f"margins_{name}"]),
                )
                for name in SETS
            ),
            report.Section(
                "Better attribution, better unlearning", (pictures["klom_by_prediction"], _effects_table(found))
            ),
            report.Section("The convex case", (pictures["ridge"],)),
        ),
        method=_method(found),
    )


def _ratio_figure(found: Everything, name: str) -> report.KeyFigure:
    best, ratio = best_baseline(found, name), _ratio(found, name)
    if ratio is None:
        dmm = _excess(found, name, _best_matched(found, name)) <= 0
        ratio = f"none: {'Datamodel Matching' if dmm else 'the best baseline'} is at the floor"
    return report.KeyFigure(
        f"Times nearer to the floor than the best baseline, {SETS[name]}", ratio,
        meaning=found.results[name].unlearned[best].title,
    )  # fmt: skip


def _method(found: Everything) -> tuple[str, ...]:
    method, count = found.config.method, len(found.setup.task.train.labels)
    return (
        f"{method.models} models of all {count:,} images unlearn; they are held against {method.oracles} models that "
        f"were retrained without the forget set, of which nothing was chosen. {method.retrained} others give the "
        f"floor; the first {method.tuning_oracles} of them are those that everything is chosen on. Identical Gaussians "
        f"score {next(iter(found.measures.values())).bias:.2f} with as many models.",
        f"Every method has {TRIALS} settings, tried on {method.tuned_models} models, and at most "
        f"{report.percent(method.compute)} of the compute of one retraining, counted in examples passed forward and "
        "backward; the short retraining starts anew. The best baseline of the lead is the best on the oracles "
        "themselves.",
        f"Attributions are of {method.subset_models:,} models on random halves, of {method.trak_models} of them for "
        f"TRAK, of {method.influence_models} full models for influence, of {method.replays} of their runs for the "
        f"derivative of training, of {method.mean_models} retrained models for their mean shift, and of "
        f"{method.paired_models} that were retrained with the seed of a full model. Each has a multiplier for the "
        "forgotten images and one for all others, chosen on the tuning oracles.",
        "KLoM: 20 bins on the pooled range of margins, the largest included; intervals resample models on either side.",
    )
