"""Unlearning: make a trained model one that cannot be told from a model retrained without the forget set.

* `finetune`: the one loop, over many models at once: losses, weights, orders and gradient masks make the methods
* `dmm`: Datamodel Matching: what retraining would change, predicted by attribution, and the fine-tuning that matches it
* `baselines`: gradient ascent and descent, SCRUB, NegGrad+, SSD, SalUn, random relabelling, Newton's step
* `ridge`: the convex case in closed form, and the paths of iterative algorithms in it
"""
