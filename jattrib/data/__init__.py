"""Data sets as numpy arrays, and the masks that say which examples a model is trained on.

* `vision`: Fashion-MNIST and its embedded excerpt, digits, NPZ
* `masks`: seeded random subsets and leave-group-out masks
* `synthetic`: data whose law is known
* `text`: shards of tokens as a source of sequences
* `corpus`: texts in the public domain, passages and sequences of bytes or characters; `debian`: where they come from
* `idx`, `safetensors`, `lzw`: file formats, read with every field checked
* `margins`: margin arrays of other people's models, in NPY files
* `excerpt`: the command that makes the embedded excerpt
"""
