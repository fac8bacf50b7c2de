"""Linear probe by SGD: the linear evaluation of SimCLR and MoCo, a grid of heads trained at once.

SimCLR (arXiv 2002.05709, B.6 and its released code): heads start at zero, Nesterov momentum 0.9, a
rate of 0.1 per 256 images that falls as a cosine, no warm-up, 90 epochs; MoCo's rates (1911.05722,
4.1) are some hundred times larger, as its features are small. On frozen features, without
augmentation, all heads of the grid see the same batches, so that one pass over the features trains
them all.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigmed import sharding
from bigmed.errors import UserError
from bigmed.evaluators import features
from bigmed.evaluators.linear import LogisticProbe, Solution, example_weights, offsets

log = logging.getLogger("bigmed")

PER_IMAGES = 256  # of a batch, to which rates refer
LEARNING_RATES = (0.01, 0.1, 1.0, 10.0)  # 0.1 is SimCLR's; the others U
WEIGHT_DECAYS = (0.0, 1e-6, 1e-4)  # 0 is the paper's, 1e-6 that of the code; 1e-4 U


class Evaluator(LogisticProbe):
    """`LogisticProbe` by SGD on features as they are.

    The loss is that of `linear`: mean cross-entropy, of each class over the images where it is
    labelled, + weight_decay/2 ||W||^2.

    Args:
      learning_rates, weight_decays: the grid; rates are multiplied by the batch size / 256.
      train_batch_size: images a step; where there are fewer, as many as there are.
      epochs: passes over the training images; the rest of a pass that fills no batch is left out.
      momentum, nesterov: of SGD.
      **probe: see `Probe`.

    Raises:
      UserError: a value that cannot work, or a grid of which no head stays finite.
    """

    NAME = "linear_sgd"

    def __init__(
        self,
        predict_fn: Any,
        mesh: Any,
        *,
        learning_rates: Sequence[float] = LEARNING_RATES,
        weight_decays: Sequence[float] = WEIGHT_DECAYS,
        train_batch_size: int = 256,
        epochs: int = 90,
        momentum: float = 0.9,
        nesterov: bool = True,
        **probe: Any,
    ):
        if not learning_rates or not weight_decays or not min(learning_rates) > 0:
            raise UserError(
                f"learning_rates={tuple(learning_rates)}, weight_decays={tuple(weight_decays)}: "
                "valid: rates above 0, decays from 0, at least one of each"
            )
        if min(weight_decays) < 0 or not 0 <= momentum < 1 or min(train_batch_size, epochs) < 1:
            raise UserError(
                f"weight_decays={tuple(weight_decays)}, momentum={momentum}, "
                f"train_batch_size={train_batch_size}, epochs={epochs}: valid: decays from 0, "
                "momentum from 0 to below 1, the others from 1"
            )
        super().__init__(predict_fn, mesh, **probe)
        self._rates, self._decays = sorted(learning_rates), sorted(weight_decays, reverse=True)
        self._recipe = {
            "batch_size": train_batch_size,
            "epochs": epochs,
            "momentum": momentum,
            "nesterov": nesterov,
        }

    def settings(self, num_train: int) -> list[dict[str, Any]]:
        del num_train
        return [
            {"lr": float(lr), "weight_decay": float(decay)}
            for lr, decay in itertools.product(self._rates, self._decays)
        ]

    def fitted(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        task: str,
    ) -> Solution:
        found = fit(x, targets, settings, task, self._mesh, seed=self._seed, **self._recipe)
        if not found.converged.any():
            raise UserError(
                f"{self.NAME}: every head of learning_rates={tuple(self._rates)} grew beyond all "
                "bounds; use lower ones"
            )
        if not found.converged.all():
            lost = [one for one, kept in zip(settings, found.converged, strict=True) if not kept]
            log.warning("%s: heads that grew beyond all bounds, left at zero: %s", self.NAME, lost)
        return found

    def _identity(self) -> Any:
        return [super()._identity(), self._rates, self._decays, self._recipe]


def fit(
    x: np.ndarray,
    targets: np.ndarray,
    settings: Sequence[Mapping[str, float]],
    task: str,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    batch_size: int,
    epochs: int,
    momentum: float,
    nesterov: bool,
) -> Solution:
    """Trains a head for each setting, all at once; the heads are divided over the mesh.

    'single_label': softmax; a class without training images gets a logit that no image reaches.
    'multi_label': an independent sigmoid for each class, its loss averaged over the images where it
    is labelled; a class without both kinds of images scores 0.5 everywhere.

    Args:
      x: float32 [N, D].
      targets: [N, L] from 0 to 1, negative for unknown; one-hot for 'single_label'.
      settings: G of {'lr': at a batch of 256, 'weight_decay': of the kernel}.
      task: 'single_label' or 'multi_label'.
      mesh: of `bigmed.sharding.make_mesh`.
      seed: of the order of the images, see `order`.
      batch_size, epochs, momentum, nesterov: see `Evaluator`.

    Returns:
      The heads; those that did not stay finite are zero and not `converged`.
    """
    batch_size, heads = min(batch_size, len(x)), len(settings)
    shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    filled = [*settings, *settings[-1:] * (-heads % shards)]  # as many for each device
    rates = np.array([setting["lr"] for setting in filled], np.float32) * batch_size / PER_IMAGES
    decays = np.array([setting["weight_decay"] for setting in filled], np.float32)
    # the mean over a batch is then an unbiased estimate of the whole loss
    weights = example_weights(targets, task) * np.float32(len(x))
    offset = offsets(targets, task)
    whole = (x, np.maximum(targets, 0).astype(np.float32), weights, offset)
    everywhere, of_heads = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    with jax.default_matmul_precision("highest"):
        trained = _train_compiled(
            *(sharding.place(array.astype(np.float32), of_heads) for array in (rates, decays)),
            *(sharding.place(array, everywhere) for array in whole),
            sharding.place(np.array(seed, np.int32), everywhere),
            multinomial=task == "single_label",
            batch_size=batch_size,
            epochs=epochs,
            momentum=momentum,
            nesterov=nesterov,
        )
    kernel, bias = (features.on_host(array)[:heads].astype(np.float64) for array in trained)
    finite = np.isfinite(kernel).all(axis=(1, 2)) & np.isfinite(bias).all(axis=1)
    kernel, bias = (np.where(finite.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for a in (kernel, bias))
    return Solution(kernel, bias + offset, finite)


def order(
    seed: jax.Array | int, epoch: jax.Array | int, num_images: int, batch_size: int
) -> jax.Array:
    """The images of each step of an epoch, int [steps, B]: a pure function of (seed, epoch)."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    steps = num_images // batch_size
    shuffled = jax.random.permutation(key, num_images)
    return shuffled[: steps * batch_size].reshape(steps, batch_size)


def _train_all(
    rates: jax.Array,
    decays: jax.Array,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    offset: jax.Array,
    seed: jax.Array,
    *,
    multinomial: bool,
    batch_size: int,
    epochs: int,
    momentum: float,
    nesterov: bool,
) -> tuple[jax.Array, jax.Array]:
    """(kernel [G, D, L], bias [G, L]) of rates [G] and decays [G]."""
    (n, d), num_classes = x.shape, targets.shape[1]
    steps = n // batch_size
    trace = optax.trace(momentum, nesterov)

    def loss(head: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
        logits = x[rows] @ head["kernel"] + (head["bias"] + offset)[None]  # BD.DL = BL
        if multinomial:
            losses = -targets[rows] * jax.nn.log_softmax(logits)
        else:
            losses = jax.nn.softplus(logits) - targets[rows] * logits
        return jnp.sum(weights[rows] * losses) / batch_size

    def train(rate: jax.Array, decay: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: Any, now: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            (head, state), (number, rows) = carry, now
            gradient = jax.grad(loss)(head, rows)
            gradient["kernel"] += decay * head["kernel"]
            update, state = trace.update(gradient, state)
            now_rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * number / (epochs * steps)))
            return (jax.tree.map(lambda w, u: w - now_rate * u, head, update), state), None

        def epoch(carry: Any, number: jax.Array) -> tuple[Any, None]:
            numbers = number * steps + jnp.arange(steps)
            return jax.lax.scan(step, carry, (numbers, order(seed, number, n, batch_size)))

        head = {"kernel": jnp.zeros((d, num_classes)), "bias": jnp.zeros(num_classes)}
        (head, _), _ = jax.lax.scan(epoch, (head, trace.init(head)), jnp.arange(epochs))
        return head["kernel"], head["bias"]

    return jax.vmap(train)(rates, decays)


_train_compiled = jax.jit(
    _train_all,
    static_argnames=("multinomial", "batch_size", "epochs", "momentum", "nesterov"),
)
