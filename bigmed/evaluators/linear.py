"""Linear probe: L2-regularised logistic regression on frozen features, for a grid of strengths.

The protocol of SimCLR's transfer experiments (arXiv 2002.05709, B.8): L-BFGS, no augmentation, the
strength chosen on validation. The whole grid is solved in one call, on the device, in float32.
"""

import abc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigmed import sharding, statistics
from bigmed.calibration import probabilities_of
from bigmed.errors import UserError
from bigmed.evaluators.parts import learnable
from bigmed.evaluators.probe import Probe

log = logging.getLogger("bigmed")

L2_GRID = tuple(float(value) for value in np.logspace(-6, 2, 17))
MEMORY = 10  # pairs of steps and gradients that L-BFGS keeps
MIN_CURVATURE = 1e-6  # of a class's p (1 - p), for the units of `_solve_grid`
LINE_STEPS = 20  # points that a line search tries
# Largest element of the gradient, in the units of `_solve_grid`: aimed at, and accepted.
TARGET, ACCEPTED = 1e-5, 1e-4
SMALLEST_SIZE = 64  # images that a program is compiled for
NEVER = -1e9  # logit of a class without training images


class Solution(NamedTuple):
    """Classifiers of every setting, for features as they were given (not standardised).

    Attributes:
      kernel: float64 [G, D, L]. bias: float64 [G, L].
      converged: bool [G].
    """

    kernel: np.ndarray
    bias: np.ndarray
    converged: np.ndarray


class LogisticProbe(Probe):
    """`Probe` by logistic regression: multinomial for single-label data, else one per class.

    With `uncertain='three_class'` each class has a multinomial one of absent, present and uncertain
    (U-MultiClass of CheXpert, arXiv 1901.07031), whose score is present / (absent + present).
    """

    @abc.abstractmethod
    def fitted(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        task: str,
    ) -> Solution:
        """A classifier of each setting, learnt from x [N, D] and targets [N, L]."""

    def scores(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        queries: np.ndarray,
    ) -> np.ndarray:
        """Probabilities [G, M, L]."""
        if self._uncertain != "three_class":
            return self._predicted(settings, x, targets, queries, self._task)
        scores = np.full((len(settings), len(queries), targets.shape[1]), 0.5)
        for c in np.flatnonzero(learnable(targets)):
            codes = np.array([0, 1, statistics.UNCERTAIN])
            of_class = (targets[:, c, None] == codes).astype(np.int8)  # [N, 3]
            known = of_class.any(axis=1)
            p = self._predicted(settings, x[known], of_class[known], queries, "single_label")
            scores[:, :, c] = p[:, :, 1] / np.maximum(p[:, :, 0] + p[:, :, 1], 1e-300)
        return scores

    def _predicted(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        queries: np.ndarray,
        task: str,
    ) -> np.ndarray:
        found = self.fitted(settings, x, targets, task)
        return np.stack([predict(found, g, queries, task) for g in range(len(settings))])


class Evaluator(LogisticProbe):
    """`LogisticProbe` by L-BFGS.

    Args:
      l2_grid: strengths to choose from; the loss is mean cross-entropy + l2/2 ||W||^2 on features
        of zero mean and unit variance; scikit-learn's C is 1 / (l2 N).
      max_iterations: of L-BFGS; strengths that need more are used as they are, with a line in the
        log.
      **probe: see `Probe`.
    """

    NAME = "linear"

    def __init__(
        self,
        predict_fn: Any,
        mesh: Any,
        *,
        l2_grid: Sequence[float] = L2_GRID,
        max_iterations: int = 500,
        **probe: Any,
    ):
        if not l2_grid or not all(value > 0 for value in l2_grid) or max_iterations < 1:
            raise UserError(
                f"l2_grid={tuple(l2_grid)}, max_iterations={max_iterations}: valid: positive values"
            )
        super().__init__(predict_fn, mesh, **probe)
        self._l2_grid, self._max_iterations = tuple(l2_grid), max_iterations

    def settings(self, num_train: int) -> list[dict[str, Any]]:
        del num_train
        return [{"l2": value} for value in sorted(self._l2_grid, reverse=True)]

    def fitted(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        task: str,
    ) -> Solution:
        l2 = [setting["l2"] for setting in settings]
        found = fit(x, targets, l2, task, self._mesh, max_iterations=self._max_iterations)
        if not found.converged.all():
            late = ", ".join(f"{value:.1e}" for value in np.asarray(l2)[~found.converged])
            log.warning(
                "%s: not converged after %d iterations at l2 = %s",
                self.NAME, self._max_iterations, late,
            )  # fmt: skip
        return found


def predict(found: Solution, g: int, x: np.ndarray, task: str) -> np.ndarray:
    """Probabilities float64 [M, L] of features [M, D] under the g-th setting."""
    logits = x.astype(np.float64) @ found.kernel[g] + found.bias[g]  # MD.DL = ML
    return probabilities_of(logits, np.ones(1), task)


def fit(
    x: np.ndarray,
    targets: np.ndarray,
    l2: Sequence[float],
    task: str,
    mesh: jax.sharding.Mesh,
    *,
    max_iterations: int = 500,
) -> Solution:
    """Minimises, for every l2, mean cross-entropy + l2/2 ||W||^2 on standardised features.

    'single_label': softmax over the classes that have training images; the others get a logit that
    no image reaches. 'multi_label': an independent sigmoid for each class, its mean taken over the
    images where it is labelled; a class without both kinds of images scores 0.5 everywhere.

    Args:
      x: float32 [N, D].
      targets: [N, L] from 0 to 1, negative for unknown; one-hot for 'single_label'.
      l2: G strengths, positive.
      task: 'single_label' or 'multi_label'.
      mesh: the images are divided over it.
      max_iterations: of L-BFGS.
    """
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    varies = std > 1e-6 * np.maximum(np.abs(mean), 1e-30)  # less is rounding
    scale = np.where(varies, 1 / np.where(varies, std, 1), 0)
    x = ((x - mean) * scale).astype(np.float32)
    weights = example_weights(targets, task)
    offset = offsets(targets, task)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    size = _padded_size(len(x), math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES))
    falling = np.argsort(np.negative(l2), kind="stable")  # see `_solve_grid`
    split = (x, np.maximum(targets, 0).astype(np.float32), weights)
    shared = (offset, np.asarray(l2, np.float32)[falling])
    with jax.default_matmul_precision("highest"):
        solved = _solve_compiled(
            *(sharding.place(_pad(array, size), rows) for array in split),
            *(sharding.place(array, everywhere) for array in shared),
            task == "single_label",
            max_iterations,
        )
    kernel, bias, size = (np.asarray(array)[np.argsort(falling)] for array in solved)
    kernel = kernel.astype(np.float64) * scale[:, None]
    bias = bias.astype(np.float64) + offset - mean @ kernel
    return Solution(kernel, bias, size <= ACCEPTED)


def offsets(targets: np.ndarray, task: str) -> np.ndarray:
    """float32 [L], added to logits: `NEVER` for a class of 'single_label' without an image."""
    absent = ~(targets == 1).any(axis=0) & (task == "single_label")
    return np.where(absent, np.float32(NEVER), np.float32(0))


def example_weights(targets: np.ndarray, task: str) -> np.ndarray:
    """float32 [N, L]: what the cross-entropy of each image and class counts; columns sum to 1."""
    if task == "single_label":
        return np.full(targets.shape, 1 / len(targets), np.float32)
    known = (targets >= 0) & learnable(targets)
    return (known / np.maximum(known.sum(axis=0), 1)).astype(np.float32)


def _padded_size(n: int, multiple: int) -> int:
    """`n` or somewhat more: subsets of about one size are solved by one compiled program."""
    step = max(SMALLEST_SIZE, 2 ** (n.bit_length() - 3))  # at most a quarter of n from 256 on
    size = math.ceil(n / step) * step
    return math.ceil(size / multiple) * multiple


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """With rows of zeros at the end, which have no weight in the loss."""
    return np.pad(array, ((0, size - len(array)), (0, 0)))


def _solve_grid(
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    offset: jax.Array,
    l2: jax.Array,
    multinomial: bool,
    max_iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(kernel [G, D, L], bias [G, L], largest gradient element [G]); l2 falls.

    The variables are W in the eigenbasis V of the features' covariance, each element in units of
    the square root of about the loss's curvature along it: var * (mean p (1 - p) of the class) +
    l2. The Hessian is then near the identity, whatever the features' correlations, and a few dozen
    iterations do; in the coordinates of W, weak regularisation of correlated features needs
    thousands. Each strength starts at the solution of the stronger one before it, which also gives
    p: where the classes are separable, p (1 - p) falls by orders of magnitude along the way.
    Kernels are [L, D] inside.
    """
    n = jnp.sum(jnp.any(weights > 0, axis=1))
    variances, basis = jnp.linalg.eigh(x.T @ x / n)  # DN.ND = DD
    variances = jnp.maximum(variances, 1e-7 * variances.max())  # below, it is rounding
    rotated = x @ basis  # ND.DD = ND

    def logits_of(kernel: jax.Array, bias: jax.Array) -> jax.Array:
        # LD.DN = LN: four times as fast as ND.DL on a CPU, where L is small
        return (kernel @ rotated.T).T + (bias + offset)[None, :]

    def solve(
        stronger: tuple[jax.Array, jax.Array], strength: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
        logits = logits_of(*stronger)
        p = jax.nn.softmax(logits) if multinomial else jax.nn.sigmoid(logits)
        curvature = jnp.maximum(jnp.sum(weights * p * (1 - p), axis=0), MIN_CURVATURE)  # [L]
        unit = (curvature[:, None] * variances[None, :] + strength) ** -0.5  # LD
        unit_bias = curvature**-0.5

        def loss(variables: dict[str, jax.Array]) -> jax.Array:
            kernel = unit * variables["kernel"]
            logits = logits_of(kernel, unit_bias * variables["bias"])
            if multinomial:
                losses = -targets * jax.nn.log_softmax(logits)
            else:
                losses = jax.nn.softplus(logits) - targets * logits
            return jnp.sum(weights * losses) + 0.5 * strength * jnp.sum(kernel**2)

        start = {"kernel": stronger[0] / unit, "bias": stronger[1] / unit_bias}
        found, size = _lbfgs(loss, start, max_iterations)
        kernel, bias = unit * found["kernel"], unit_bias * found["bias"]
        return (kernel, bias), (basis @ kernel.T, bias, size)  # DD.DL = DL

    zero = jnp.zeros((targets.shape[1], x.shape[1])), jnp.zeros(targets.shape[1])
    _, solutions = jax.lax.scan(solve, zero, l2)
    return solutions


_solve_compiled = jax.jit(_solve_grid, static_argnums=(5, 6))


def _lbfgs(
    loss: Callable[[Any], jax.Array], start: Any, max_iterations: int
) -> tuple[Any, jax.Array]:
    """The minimum, and the largest element of the gradient there.

    Stops early where the line search finds no step, because the loss differs by less than its
    rounding.
    """
    line_search = optax.scale_by_zoom_linesearch(LINE_STEPS, initial_guess_strategy="one")
    optimiser = optax.lbfgs(memory_size=MEMORY, linesearch=line_search)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def size(gradient: Any) -> jax.Array:
        return jnp.max(jnp.array([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))

    def unfinished(carry: Any) -> jax.Array:
        _, state, gradient_size = carry
        count, tried = (optax.tree.get(state, k) for k in ("count", "num_linesearch_steps"))
        return (count < max_iterations) & (gradient_size > TARGET) & (tried < LINE_STEPS)

    def iterate(carry: Any) -> Any:
        variables, state, _ = carry
        value, gradient = value_and_grad(variables, state=state)
        updates, state = optimiser.update(
            gradient, state, variables, value=value, grad=gradient, value_fn=loss
        )
        after = optax.tree.get(state, "grad")  # where the line search ended
        return optax.apply_updates(variables, updates), state, size(after)

    carry = (start, optimiser.init(start), jnp.inf)
    found, _, gradient_size = jax.lax.while_loop(unfinished, iterate, carry)
    return found, gradient_size
