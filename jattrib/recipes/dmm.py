"""Datamodel Matching beside other ways to unlearn, on an image classifier and three forget sets.

The recipe trains an ensemble, and models without each forget set; predicts by every attribution what leaving the set
out does to all logits; fine-tunes the ensemble towards that, and by every baseline; and asks whether the results can be
told from retrained models.  All that is chosen is chosen on retrained models of which no figure is.  The first model is
kept in the folder `classifier`, for `jattrib unlearn`.
"""

import shutil

import jax

from jattrib.recipes import classifier, dmm_measures, dmm_report, dmm_stages, dmm_tuning, rundir
from jattrib.recipes.dmm_stages import SETS, Config


def run(config: Config, directory: rundir.RunDir) -> None:
    """Train, predict, unlearn, measure, and write pictures, report and summary."""
    dmm_stages.check(config)
    setup = dmm_stages.prepare(config, directory)
    trainings = dmm_stages.train(config, setup, directory)
    results = dmm_tuning.run(config, setup, trainings, directory)
    with rundir.stage(directory, "measure"):
        measures = {
            name: dmm_measures.measure(
                results[name], dmm_tuning.margins_of(setup, name, trainings.retrained[name].others),
                setup.keys["statistics"],
            )
            for name in SETS
        }  # fmt: skip
        paths = dmm_measures.ridge_paths(setup.keys["statistics"])
    params, state = jax.tree.map(lambda leaf: leaf[0], (trainings.models.params, trainings.models.state))
    made_of = classifier.Description(config.data, config.model, config.training)
    classifier.save(directory.path / "classifier", made_of, params, state, setup.task.train.labels)
    dmm_report.write(directory, dmm_report.Everything(config, setup, results, measures, paths))
    for stage in ("subsets", *(f"oracles_{name}" for name in SETS)):  # half a gigabyte of logits
        shutil.rmtree(directory.path / rundir.RESUME / stage)
