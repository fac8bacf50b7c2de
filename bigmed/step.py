"""One training step, compiled once for a mesh, and the search for a non-finite tensor."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigmed import optim, sharding, tree
from bigmed.errors import UserError, did_you_mean
from bigmed.objectives.base import EMBED_STREAM
from bigmed.state import TrainState, shardings, stream

BATCH_NORMS = ("micro", "frozen")


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """How many parts of a batch the encoders see one after the other (`config.micro_batch`).

    Attributes:
      count: 1: the batch as a whole.
      batch_norm: of the encoders, where there are several: 'micro', the statistics of each part,
        so that the loss is that of a batch norm over fewer images; or 'frozen', the running
        statistics, which then stay as they are, and with which the gradient is exactly that of the
        whole batch. Heads always see the whole batch, but for the projection that 'supervised'
        keeps, a part of what it trains. Encoders without batch norm do not care, but 'frozen'
        also switches off their dropout.

    Raises:
      UserError: an unknown value.
    """

    count: int = 1
    batch_norm: str = "micro"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"config.micro_batch.count={self.count}: valid: 1 and more")
        if self.batch_norm not in BATCH_NORMS:
            raise UserError(
                f"config.micro_batch.batch_norm='{self.batch_norm}': "
                f"{did_you_mean(self.batch_norm, BATCH_NORMS)}"
            )


def loss_and_grads(
    objective: Any, state: TrainState, batch: Mapping[str, Any], micro: MicroBatches
) -> Any:
    """((loss, aux), gradients) of the objective at `state` on a global batch."""
    key = stream(jax.random.wrap_key_data(state.key), "train", state.step)
    if micro.count > 1:
        return _in_parts(objective, state, batch, key, micro)

    def loss(params: Any) -> Any:
        return objective.loss(params, state.batch_stats, state.extra, batch, key, True)

    return jax.value_and_grad(loss, has_aux=True)(state.params)


def _in_parts(
    objective: Any, state: TrainState, batch: Mapping[str, Any], key: jax.Array, micro: MicroBatches
) -> Any:
    """The same with the activations of one part in memory at a time (arXiv 2101.06983, section 3).

    First the encoders' outputs for every part, without a gradient; then the gradient of the whole
    batch's loss with respect to those outputs; then every part again, with that gradient put in.
    Parts are strided, row i being in part i mod count, so that they do not depend on how many
    devices the rows are spread over and none of their rows leaves its device. Both passes draw
    alike: the inputs are made once, and a part's key is that of its number.
    """
    train = micro.batch_norm == "micro"
    numbers = jnp.arange(micro.count)
    inputs = objective.prepare(batch, key, True)
    parts = jax.tree.map(lambda x: _split(x, micro.count), inputs)

    def embed(params: Any, stats: Any, number: jax.Array, part: Any) -> Any:
        part_key = jax.random.fold_in(key, EMBED_STREAM + number)
        return objective.embed(params, stats, state.extra, part, part_key, train)

    def first_pass(stats: Any, of_part: Any) -> Any:
        outputs, stats = embed(state.params, stats, *of_part)
        return stats, outputs

    stats, outputs = jax.lax.scan(first_pass, state.batch_stats, (numbers, parts))
    outputs = jax.tree.map(_join, outputs)

    def compare(params: Any, outputs: Any) -> Any:
        return objective.compare(params, stats, state.extra, outputs, batch, key, True)

    (loss, aux), (grads, cotangents) = jax.value_and_grad(compare, (0, 1), has_aux=True)(
        state.params, outputs
    )
    cotangents = jax.tree.map(lambda x: _split(x, micro.count), cotangents)

    def second_pass(grads: Any, of_part: Any) -> Any:
        *of_part, cotangent = of_part
        # the running statistics that a part meets do not enter its outputs, unless frozen
        _, pull_back = jax.vjp(lambda p: embed(p, state.batch_stats, *of_part)[0], state.params)
        return jax.tree.map(jnp.add, grads, pull_back(cotangent)[0]), None

    grads, _ = jax.lax.scan(second_pass, grads, (numbers, parts, cotangents))
    activations = {"1_inputs": inputs, "2_outputs": outputs, **aux["activations"]}
    return (loss, {**aux, "activations": activations}), grads


def _split(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...], row i in part i mod count."""
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Undoes `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def make_train_step(
    objective: Any,
    tx: Any,
    schedule: Any,
    mesh: Any,
    abstract: TrainState,
    micro: MicroBatches,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step(state, batch, step, skip) -> (state, metrics)`, jitted, its state donated.

    `step` is the int32 number of the batch and `skip` a boolean scalar. A batch whose loss or
    gradient is not finite leaves the state as it was, its step number included; and a state whose
    step is not the batch's number is left alone. So the first bad batch stops the state for good,
    without the host having to look at every step. A skipped batch counts as a step and changes
    nothing else.
    """

    def train_step(
        state: TrainState, batch: Mapping[str, Any], step: jax.Array, skip: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, aux), grads = loss_and_grads(objective, state, batch, micro)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss + grad_norm + optax.tree.norm(updates))
        updated = state.replace(
            params=params,
            batch_stats=aux["batch_stats"],
            opt_state=opt_state,
            extra=objective.after_update(params, state.extra, aux["carry"], state.step),
        )
        in_turn = state.step == step
        kept = _select(in_turn & finite & ~skip, updated, state)
        new = kept.replace(step=jnp.where(in_turn & (finite | skip), step + 1, state.step))
        metrics = {
            "loss": loss,
            **aux["metrics"],
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(state.params),
            "lr": optim.learning_rate(schedule, state.opt_state),
        }
        return new, {"metrics": metrics, "step": new.step}

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings(abstract), sharding.replicated(mesh)),
    )


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def first_non_finite(
    objective: Any, state: TrainState, batch: Mapping[str, Any], micro: MicroBatches
) -> str:
    """The name of the first tensor that is not finite, in the order in which they are computed.

    Compiles a program of its own, so it is for when a step has already gone wrong. The order is:
    parameters, batch statistics, the objective's intermediate tensors (`aux['activations']`), loss,
    gradients.
    """

    def examine(state: TrainState, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        (loss, aux), grads = loss_and_grads(objective, state, batch, micro)
        stages = {
            "params": state.params,
            "batch_stats": state.batch_stats,
            "activations": aux["activations"],
            "loss": loss,
            "gradients": grads,
        }
        return {
            f"{stage}/{name}".rstrip("/"): jnp.all(jnp.isfinite(leaf))
            for stage, values in stages.items()
            for name, leaf in tree.flatten(values).items()
        }

    # jit returns dictionaries sorted by key; the order of computation is kept beside it.
    order: list[str] = []

    def in_order(state: TrainState, batch: Mapping[str, Any]) -> list[jax.Array]:
        found = examine(state, batch)
        order[:] = list(found)
        return list(found.values())

    finite = [bool(np.asarray(ok)) for ok in jax.jit(in_order)(state, batch)]
    return next(
        (name for name, ok in zip(order, finite, strict=True) if not ok), "none when computed again"
    )
