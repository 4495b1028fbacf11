"""Influence functions with every curvature on an image classifier, and whether what they say is true.

One run, its gradients, and four ways to invert a curvature: EK-FAC, conjugate gradients, Arnoldi's eigenvectors,
DataInf.  Each has its damping chosen on held-out models; then models retrained on random halves, and the run itself
repeated without a few images, say how well summed scores predict them, and whether a prediction suffers when the images
that helped it most are left out.
"""

import numpy as np

from jattrib.core.progress import track
from jattrib.recipes import comparison_influence as influences
from jattrib.recipes import comparison_stages, experiment, influence_report, influence_stages, rundir
from jattrib.recipes.comparison_base import Attributor
from jattrib.recipes.influence_stages import Config, Run

ATTRIBUTORS = (
    Attributor("ekfac", "EK-FAC", influences.ekfac, runs=1),
    Attributor("cg", "CG", influences.conjugate_gradients, runs=1),
    Attributor("arnoldi", "Arnoldi", influences.arnoldi, runs=1),
    Attributor("datainf", "DataInf", influences.datainf, runs=1),
    Attributor("logra", "LoGra", influences.logra, runs=1),
    Attributor("gradient_dot", "gradient dot", influences.gradient_dot, runs=1),
    Attributor("similarity", "cosine of pixels", lambda context: {0.0: experiment.similarity(context.task)}),
)
"""What is measured; the first is the one whose images are shown and left out."""


def run(config: Config, directory: rundir.RunDir) -> None:
    """Train, attribute by every curvature, verify, and write pictures, report and summary."""
    task = experiment.prepare(config, directory)
    whole = influence_stages.one(comparison_stages.train_whole(config, task, directory))
    truths = comparison_stages.retrain(config, task, directory, config.evaluation)
    context, measured = Run(config, task, whole), []
    with rundir.stage(directory, "attributing"), track(len(ATTRIBUTORS), "attributing") as advance:
        for method in ATTRIBUTORS:
            measured.append(influence_stages.measure(context, truths, method))
            advance(1)
    with rundir.stage(directory, "counterfactual") as folder:
        left_out = experiment.leave_out(config, task, np.asarray(measured[0].scores), folder)
    references = comparison_stages.references(task, truths)
    influence_report.write(
        directory, influence_report.Results(config, task, tuple(measured), references, truths, left_out)
    )
