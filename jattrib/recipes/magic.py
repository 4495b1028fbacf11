"""MAGIC on an image classifier: the exact derivative of one training run, and what it is good for.

The recipe differentiates the margins of test images, after one run, with respect to the weight of every training image,
and asks that run itself: how well do the scores predict what it does without a random part of the images?  Then it
flips labels, and descends the loss on validation images on the weights of the training images.
"""

from jattrib.recipes import experiment, magic_report, magic_stages, rundir
from jattrib.recipes.magic_stages import Config


def run(config: Config, directory: rundir.RunDir) -> None:
    """Differentiate, verify, measure the cost, descend, and write pictures, report and summary."""
    task = experiment.prepare(config, directory)
    magic_stages.check(config)
    with rundir.stage(directory, "metagradient") as folder:
        found = magic_stages.attribute(config, task, folder, fraction=config.method.smoothness_fraction)
    truths = tuple(
        experiment.retrain_fixed(config, task, directory, fraction=fraction, subsets=config.method.subsets)
        for fraction in config.method.fractions
    )
    expected = experiment.retrain(config, task, directory, "subsets", config.evaluation.subsets)
    with rundir.stage(directory, "cost") as folder:
        cost = magic_stages.measure_cost(config, task, folder, count=config.method.cost_queries)
    with rundir.stage(directory, "descent") as folder:
        descent = magic_stages.descend(config, task, folder)
    with rundir.stage(directory, "scores"):
        fidelity = magic_stages.compare(config, task, found, truths, expected)
    magic_report.write(directory, magic_report.Results(config, task, found, truths, fidelity, cost, descent))
