"""Gradients of single examples, of any output function.

* `per_example`: as they are, `vmap` of `grad`
* `inner`: their inner products with directions
* `taps`: in factored form, layer inputs and output gradients; its parts are `program` (the gradient's own program and
  the way back through it), `views` (how entries of an array are a leaf's), `sites` (factors at one place), `layers`
  (which places make a layer) and `rerun` (the program on a batch, without the products)
"""
