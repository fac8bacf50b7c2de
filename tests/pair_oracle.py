"""The pairwise losses in float64, from their definitions, and their gradients by complex steps.

A step of i * 1e-30 has the derivative in its imaginary part, to the last bits: nothing cancels.
"""

import numpy as np

STEP = 1e-30


def unit(z):
    return z / np.sqrt(np.sum(z * z, axis=1, keepdims=True))


def _log_sum(x, taken):
    highest = np.max(np.where(taken, x.real, -np.inf), axis=1, keepdims=True)
    return np.log(np.sum(np.where(taken, np.exp(x - highest), 0), axis=1)) + highest[:, 0]


def _softplus(x):
    return np.where(x.real > 0, x, 0) + np.log1p(np.exp(np.where(x.real > 0, -x, x)))


def ntxent(v, u, temperature, groups, normalise=True):
    """The mean over 2N anchors; `groups` [N] are no negatives of each other."""
    z = np.concatenate([v, u])
    z = unit(z) if normalise else z
    n, logits = len(v), z @ z.T / temperature
    partner = (np.arange(2 * n) + n) % (2 * n)
    own = partner[:, None] == np.arange(2 * n)
    groups = np.concatenate([groups, groups])
    taken = own | (groups[:, None] != groups)
    return np.mean(_log_sum(logits, taken) - logits[own])


def infonce(v, u, scale, weight, ids, duplicates):
    logits, own, equal = scale * unit(v) @ unit(u).T, np.eye(len(v), dtype=bool), _equal(ids)
    taken = own | ~equal if duplicates == "mask" else np.ones_like(own)
    positive = (own | equal if duplicates == "multi" else own).astype(float)

    def direction(logits, taken, positive):
        chosen = np.sum(logits * positive, axis=1) / np.sum(positive, axis=1)
        return np.mean(_log_sum(logits, taken) - chosen)

    there, back = direction(logits, taken, positive), direction(logits.T, taken.T, positive.T)
    return weight * there + (1 - weight) * back


def sigmoid(v, u, scale, bias, ids, duplicates):
    logits = scale * unit(v) @ unit(u).T + bias
    own, equal = np.eye(len(v), dtype=bool), _equal(ids)
    sign = np.where(own | equal if duplicates == "multi" else own, 1, -1)
    taken = own | ~equal if duplicates == "mask" else np.ones_like(own)
    return np.sum(np.where(taken, _softplus(-sign * logits), 0)) / len(v)


def _equal(ids):
    of_v, of_u = ids if isinstance(ids, tuple) else (ids, ids)
    return of_v[:, None] == of_u


def value_and_grad(loss, weights):
    """Of `loss(weights)`, a function of a dict of arrays."""
    weights = {name: np.asarray(w, np.complex128) for name, w in weights.items()}
    gradients = {name: np.zeros(w.shape) for name, w in weights.items()}
    for name, w in weights.items():
        for index in np.ndindex(w.shape):
            moved = np.array(w)
            moved[index] += 1j * STEP
            gradients[name][index] = loss({**weights, name: moved}).imag / STEP
    return loss(weights).real, gradients
