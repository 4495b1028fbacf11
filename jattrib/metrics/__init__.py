"""Metrics: arrays in, numbers out.  They say whether attributions are true, and how surely.

* `correlation`: Pearson's and Spearman's, many at once, ties and constant inputs handled
* `bootstrap`: percentile intervals over one axis, or over two jointly
* `lds`: the linear datamodeling score, its two protocols, its ceiling and its baselines
* `counterfactual`: what happens to a query when what helped it most is left out
"""
