"""Influence on a small language model of a text: which passages, and which characters, taught it to expect another?

EK-FAC and LoGra at one trained decoder.  That very run without random passages says whether summed scores are true, and
without the most helpful ones whether they matter.
"""

import numpy as np

from jattrib.core.progress import track
from jattrib.metrics import lds
from jattrib.recipes import comparison_stages, experiment, influence_text_report, influence_text_stages, rundir
from jattrib.recipes.influence_stages import one
from jattrib.recipes.influence_text_stages import Config


def run(config: Config, directory: rundir.RunDir) -> None:
    """Train, attribute, verify, and write pictures, report and summary."""
    influence_text_stages.check(config)
    task = experiment.prepare(config, directory)
    whole = one(comparison_stages.train_whole(config, task, directory))
    held_out, truth = (
        experiment.retrain_fixed(config, task, directory, fraction=config.method.fraction, subsets=count, name=name)
        for name, count in (("fixed_held_out", config.method.held_out_subsets), ("fixed", config.method.subsets))
    )
    setting = influence_text_stages.setting(config, task, whole)
    measured, methods = [], influence_text_stages.METHODS
    with rundir.stage(directory, "attributing") as folder, track(len(methods), "attributing") as advance:
        for name, (title, candidates) in methods.items():
            found = candidates(config, task, setting, folder)
            measured.append(influence_text_stages.measure(task, name, title, found, held_out=held_out, truth=truth))
            advance(1)
        tokens = influence_text_stages.by_token(setting, measured[0])
    with rundir.stage(directory, "counterfactual") as folder:
        left_out = experiment.leave_out(config, task, np.asarray(measured[0].scores), folder)
    chance = lds.random_baseline(truth.masks, truth.outputs, key=task.keys["statistics"])
    influence_text_report.write(
        directory,
        influence_text_report.Results(config, task, setting, tuple(measured), tokens, truth, chance, left_out),
    )
