"""Every attributor on the same models and queries, held against the same retrained models.

Two truths that are never compared with one another: expected margins over random subsets, averaged over seeds, and the
margins of one run repeated without a few per cent, seed and order fixed.  What is to be chosen (dampings) is chosen on
held-out models of each protocol.  Then, for a few queries, training images are removed in the order of some of the
rankings until the prediction flips, and every flip is verified by retraining.
"""

import shutil

from jattrib.core.progress import track
from jattrib.recipes import comparison_methods, comparison_report, comparison_stages, experiment, rundir, trak_stages
from jattrib.recipes.comparison_base import Config


def run(config: Config, directory: rundir.RunDir) -> None:
    """Train, attribute by every method, measure all of them alike, and write pictures, report and summary."""
    methods = comparison_methods.attributors(config)
    comparison_stages.check(config, methods)
    task = experiment.prepare(config, directory)
    trak_stages.check_projection(config, task)
    context = comparison_stages.prepare(config, task, directory)
    truths = comparison_stages.retrain(config, task, directory, config.evaluation)
    prices = comparison_stages.prices(config, directory)
    measured, rankings = [], {}
    references = comparison_stages.references(task, truths)
    with rundir.stage(directory, "attributing"), track(len(methods), "attributing") as advance:
        for method in methods:
            candidates, spent = comparison_stages.timed(method, context)
            found, rankings[method.name] = comparison_stages.measure(task, truths, method, candidates)
            measured.append(comparison_stages.charge(found, prices, spent))
            advance(1)
    with rundir.stage(directory, "brittleness") as folder:
        brittle = comparison_stages.flip(config, task, truths, rankings, folder)
    results = comparison_report.Results(config, task, tuple(measured), references, brittle)
    comparison_report.write(directory, results)
    if not config.method.keep_features:
        for name in ("features", "own_features"):
            shutil.rmtree(directory.path / rundir.RESUME / name)
