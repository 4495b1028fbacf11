"""TRAK on an image classifier, and whether what it says is true.

The recipe trains checkpoints on random halves of the training set and attributes the margins of test images to training
images.  Then it asks the ground truth, models retrained on other random halves: how well do summed scores rank them
(the linear datamodeling score), and does a prediction suffer when the images that helped it most are left out?
"""

import shutil

from jattrib.core import store
from jattrib.recipes import experiment, rundir, trak_report, trak_stages
from jattrib.recipes.trak_stages import Config
from jattrib.train import ensemble


def run(config: Config, directory: rundir.RunDir) -> None:
    """Train, attribute, verify, and write checkpoints, pictures, report and summary."""
    task = experiment.prepare(config, directory)
    trak_stages.check_projection(config, task)
    with rundir.stage(directory, "checkpoints") as folder:
        masks = experiment.draw(config, task, "checkpoints", config.method.checkpoints)
        keys = experiment.member_keys(task, "checkpoints", config.method.checkpoints, seeds=1)
        trained = ensemble.train(
            task.members, tuple(task.train), masks, keys, directory=folder / "models", identity=task.identity,
            label="training checkpoints",
        )  # fmt: skip
    store.save_params(directory.path / "checkpoints", trained._asdict(), task.identity)
    with rundir.stage(directory, "features") as folder:
        features = trak_stages.featurize(config, task, trained, folder)
    held_out = experiment.retrain(config, task, directory, "held_out", config.evaluation.held_out_subsets)
    truth = experiment.retrain(config, task, directory, "subsets", config.evaluation.subsets)
    with rundir.stage(directory, "scores"):
        choice = trak_stages.choose_damping(config, features, held_out)
        found = trak_stages.attribute(config, task, features, choice, truth)
    with rundir.stage(directory, "counterfactual") as folder:
        left_out = experiment.leave_out(config, task, found.scores, folder)
    trak_report.write(directory, trak_report.Results(config, task, choice, found, truth, left_out))
    if not config.method.keep_features:
        shutil.rmtree(directory.path / rundir.RESUME / "features")
