"""One training step, compiled once for a mesh, and the search for a non-finite tensor."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigmed import optim, sharding, tree
from bigmed.state import TrainState, shardings, stream


def loss_and_grads(objective: Any, state: TrainState, batch: Mapping[str, Any]) -> Any:
    """((loss, aux), gradients) of the objective at `state` on a global batch."""
    key = stream(jax.random.wrap_key_data(state.key), "train", state.step)

    def loss(params: Any) -> Any:
        return objective.loss(params, state.batch_stats, state.extra, batch, key, True)

    return jax.value_and_grad(loss, has_aux=True)(state.params)


def make_train_step(
    objective: Any, tx: Any, schedule: Any, mesh: Any, abstract: TrainState
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
        (loss, aux), grads = loss_and_grads(objective, state, batch)
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
            "lr": jnp.asarray(schedule(optim.updates_done(state.opt_state)), jnp.float32),
        }
        return new, {"metrics": metrics, "step": new.step}

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings(abstract), sharding.replicated(mesh)),
    )


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def first_non_finite(objective: Any, state: TrainState, batch: Mapping[str, Any]) -> str:
    """The name of the first tensor that is not finite, in the order in which they are computed.

    Compiles a program of its own, so it is for when a step has already gone wrong. The order is:
    parameters, batch statistics, the objective's intermediate tensors (`aux['activations']`, whose
    names sort in the order of computation), loss, gradients.
    """

    def examine(state: TrainState, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        (loss, aux), grads = loss_and_grads(objective, state, batch)
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
