"""Attribution: from features, or masks and outputs, to scores.

* `trak`, `influence`, `tracin`: gradients; `features` keeps them, `index` finds the largest scores among many
* `datamodels`: regression on retrained models; `surrogate` is the regression (`design`, `elastic_net` with
  `active_set`, and `kernel_ridge` are behind it)
* `magic`: the derivative of training; `smoothness` says whether it means anything
"""
