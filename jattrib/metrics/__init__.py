"""Metrics: arrays in, numbers out.  They say whether attributions are true, and how surely.

* `correlation`: Pearson's and Spearman's, many at once, ties and constant inputs handled
* `bootstrap`: percentile intervals over one axis, or over two jointly
* `lds`: the linear datamodeling score, its two protocols, its ceiling and its baselines
* `counterfactual`: what happens to a query when what helped it most is left out
* `leave_out`: scores against the measured effects of leaving one example out, or k
* `brittleness`: how few examples have to go for a prediction to flip
* `mislabelled`: whether a score finds planted wrong labels
* `klom`: whether unlearned models can be told from retrained ones, by the divergence of their margins
* `membership`: the same by attack, a likelihood ratio or every interval of margins
"""
