"""Data attribution, machine unlearning and data selection in JAX.

Data flows one way: data, model, per-example gradients, projected features, scores, application, metric, report.
A lower floor never imports a higher one.

* `core`: protocols, pytree algebra, meshes, one pass over data, rows on disk
* `metrics`: linear datamodeling score, leave-out tests, KLoM, correlations, bootstrap intervals: arrays in, numbers out
* `data`: Fashion-MNIST and its embedded excerpt, digits, NPZ, texts and tokens; seeded subset masks
* `models`: MLP, ResNet-9 and decoders as pure functions, the door for models of any library, output functions
* `train`: one `lax.scan` over an index schedule; ensembles, each on its own mask and seed; replay, its derivative
* `grads`: per-example gradients, whole or as layer inputs and output gradients
* `projection`: random projections of gradient pytrees; the only door to the kernels
* `curvature`: products with it, and damped inverses: conjugate gradients, LiSSA, Arnoldi, EK-FAC, explicit
* `attribution`: TRAK, influence, TracIn, MAGIC, datamodels
* `unlearning`: Datamodel Matching and the baselines beside it
* `recipes`: configs, the command line, plots, reports: the only place that knows files and terminals
"""

from importlib import metadata

from jattrib.core import compiler

__version__ = "0.1.0"

compiler.warn_if_unsound(metadata.version("jaxlib"))
