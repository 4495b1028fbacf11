"""Datamodels on an image classifier: how many retrained models does an attribution need, and which use of them is best?

The recipe trains models on random halves of the training set and regresses their margins on the halves, by the LASSO,
by ridge, and by the denoised difference of means; it gives TRAK the gradients of some of the same models, and ridge the
scores of TRAK as a prior.  All are held against models retrained on other halves, at several numbers of models.
"""

import shutil

from jattrib.recipes import datamodels_report, datamodels_stages, experiment, rundir, trak_stages
from jattrib.recipes.datamodels_stages import Config


def run(config: Config, directory: rundir.RunDir) -> None:
    """Train, attribute, verify, and write pictures, report and summary."""
    datamodels_stages.check(config)
    task = experiment.prepare(config, directory)
    trak_stages.check_projection(config, task)
    features = datamodels_stages.featurize(config, task, directory)
    models = datamodels_stages.train(config, task, directory)
    truth = experiment.retrain(config, task, directory, "subsets", config.evaluation.subsets)
    with rundir.stage(directory, "scores") as folder:
        found = datamodels_stages.attribute(config, task, features, models, truth, folder)
    datamodels_report.write(directory, datamodels_report.Results(config, task, found, truth))
    if not config.method.keep_features:
        shutil.rmtree(directory.path / rundir.RESUME / "features")
