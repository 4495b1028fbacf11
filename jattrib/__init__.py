"""Data attribution, machine unlearning and data selection in JAX.

Data flows one way: data, model, per-example gradients, projected features, scores, application, metric, report.
A lower floor never imports a higher one.

* `core`: protocols, pytree algebra, meshes, one pass over data, rows on disk
* `metrics`: linear datamodeling score, correlations, bootstrap intervals: arrays in, numbers out
* `data`: Fashion-MNIST and its embedded excerpt, digits, NPZ; seeded subset masks
* `models`: MLP and ResNet-9 as pure functions, the door for models of any library, output functions
* `train`: one `lax.scan` over an index schedule; ensembles of models, each on its own mask and seed
* `grads`: per-example gradients
* `projection`: random projections of gradient pytrees; the only door to the kernels
* `attribution`: TRAK
* `recipes`: configs, the command line, plots, reports: the only place that knows files and terminals
"""

__version__ = "0.1.0"
