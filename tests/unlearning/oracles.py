"""Softmax regression in float64, by plain NumPy; parameters are [inputs + 1, classes], the bias last."""

import numpy as np


def extended(x):
    return np.concatenate([np.asarray(x, np.float64), np.ones((len(x), 1))], axis=1)


def probabilities(theta, x):
    logits = extended(x) @ theta
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def losses(theta, x, labels):
    return -np.log(probabilities(theta, x)[np.arange(len(x)), labels])


def gradients(theta, x, labels):
    """Per-example gradients [n, inputs + 1, c]."""
    residual = probabilities(theta, x) - np.eye(theta.shape[1])[labels]
    return extended(x)[:, :, None] * residual[:, None, :]


def hessian(theta, x):
    """Of the mean loss, on the raveled parameters."""
    p, z = probabilities(theta, x), extended(x)
    middle = np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - p[:, :, None] * p[:, None, :]
    size = z.shape[1] * p.shape[1]
    return np.einsum("ni,ncd,nj->icjd", z, middle, z).reshape(size, size) / len(x)


def minimum(x, labels, *, damping):
    theta = np.zeros((x.shape[1] + 1, labels.max() + 1))
    for _ in range(50):
        gradient = gradients(theta, x, labels).mean(axis=0).ravel() + damping * theta.ravel()
        step = np.linalg.solve(hessian(theta, x) + damping * np.eye(theta.size), gradient)
        theta = theta - step.reshape(theta.shape)
    return theta


def followed(theta, x, labels, phases):
    """Phases of gradient descent with momentum .9, each from rest, on sequences `[n, t]`; padding is below zero.

    A phase is its rate and its steps; a step is a list of `(examples, weights of them, towards)`: it descends the sum
    of `Σ_i w_i (towards_i KL(p_0 ‖ p) + (1 − towards_i) ℓ_i) / m` of each, with m examples and means over tokens.
    """

    def towards(theta, at):
        return probabilities(theta, x[at].reshape(-1, x.shape[-1])).reshape(*labels[at].shape, -1)

    start = theta
    for rate, steps in phases:
        velocity = 0.0
        for parts in steps:
            gradient = 0.0
            for at, weight, part in parts:
                p, kept = towards(theta, at), labels[at] >= 0
                share = kept / np.maximum(kept.sum(axis=1, keepdims=True), 1) / len(at)
                goal = part * towards(start, at) + (1 - part) * np.eye(theta.shape[1])[labels[at]]
                residual = (p - goal) * (share * np.broadcast_to(weight, len(at))[:, None])[..., None]
                z = extended(x[at].reshape(-1, x.shape[-1]))
                gradient = gradient + z.T @ residual.reshape(-1, theta.shape[1])
            velocity = 0.9 * velocity + gradient
            theta = theta - rate * velocity
    return theta


def stacked(params, at):
    """The parameters of one of the linear models, as here."""
    return np.concatenate([np.asarray(params["kernel"][at]), np.asarray(params["bias"][at])[None]]).astype(np.float64)
