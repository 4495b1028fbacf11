"""Models as pure functions, and the scalar outputs that are attributed.

* `model`: `Model`, the pair `(init, apply)` that the rest of the house works with
* `adapt`: the door for Flax NNX, Flax Linen, Equinox-style pytrees and plain functions
* `mlp`, `resnet`, `gpt`: the models that come with the house
* `gpt_sharding`: how a decoder lies on a mesh
* `hf`, `hf_config`: decoders read and written in Hugging Face's layout
* `outputs`: margins, log-odds and losses, of labels and of sequences, from logits
"""
