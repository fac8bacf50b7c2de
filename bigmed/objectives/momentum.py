"""A teacher that follows the student, and a queue of its keys: what MoCo's descendants share.

The teacher's parameters are in `extra`, where the optimiser does not reach them; its running
statistics are among the batch statistics, each teacher module's beside its student's, so that
micro-batches update both alike. Statistics are the teacher's own and are not averaged.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigmed import augment, networks
from bigmed.errors import UserError
from bigmed.objectives import base

SCHEDULES = ("constant", "cosine")
NCE_EPS = 1e-7
HIGHEST = jax.lax.Precision.HIGHEST


class Objective(base.Objective):
    """An image objective with a teacher.

    Config (`config.objective`): `momentum`, of the teacher; `momentum_schedule`, 'constant' or
    'cosine', a cosine from there to 1 over the stage.
    """

    # heads differ among objectives; the teacher follows, see `handed_over`
    TRANSFER = ("params/backbone/.*", "batch_stats/backbone/.*")

    def __init__(self, config: Mapping[str, Any], data: base.DataSpec):
        super().__init__(config, data)
        own = self.config
        if not 0 <= own["momentum"] <= 1:
            raise UserError(f"config.objective.momentum={own['momentum']}: valid: 0 to 1")
        if own["momentum_schedule"] not in SCHEDULES:
            raise UserError(
                f"config.objective.momentum_schedule='{own['momentum_schedule']}': "
                f"valid: {', '.join(SCHEDULES)}"
            )

    def with_teacher(
        self, params: Mapping[str, Any], stats: Mapping[str, Any], *names: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(all batch statistics, the teacher's parameters): copies of the named modules'."""
        own = {networks.teacher(name): stats[name] for name in names if name in stats}
        return {**stats, **own}, {networks.teacher(name): params[name] for name in names}

    def handed_over(self, params: Any, batch_stats: Any, extra: Any) -> tuple[Any, Any]:
        """The teacher begins as the student that was handed over."""
        names = [networks.student(name) for name in extra["teacher"]]
        stats, followers = self.with_teacher(params, batch_stats, *names)
        # copies: the step is given the state's buffers, each once
        copied = {name: jax.tree.map(jnp.copy, stats[name]) for name in followers if name in stats}
        return {**stats, **copied}, {**extra, "teacher": jax.tree.map(jnp.copy, followers)}

    def move_teacher(self, params: Any, followers: Any, step: jax.Array) -> Any:
        """theta_t <- m theta_t + (1 - m) theta_s, with the student's updated parameters."""
        m = self.momentum(step)
        return {
            name: jax.tree.map(
                lambda t, s: m * t + (1 - m) * s, own, params[networks.student(name)]
            )
            for name, own in followers.items()
        }

    def momentum(self, step: jax.Array) -> jax.Array | float:
        """m of the update that ends step `step` (BYOL, arXiv 2006.07733, section 3.2)."""
        start = self.config["momentum"]
        if self.config["momentum_schedule"] == "constant":
            return start
        progress = jnp.clip(step / max(self.data.total_steps, 1), 0.0, 1.0)
        return 1 - (1 - start) * (jnp.cos(math.pi * progress) + 1) / 2

    def predict_fns(self) -> dict[str, Callable[[Any, Mapping[str, jax.Array]], jax.Array]]:
        """'encoder', the student's features, and 'teacher', its teacher's."""

        def of_teacher(state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            images = augment.eval_transform(
                self.augmentation, batch["image"][:, 0], batch["box"][:, 0]
            )
            weights = state.extra["teacher"]
            name = networks.teacher("backbone")
            return base.apply(name, self.backbone, weights, state.batch_stats, images, False)[0]

        return {**super().predict_fns(), "teacher": of_teacher}


# ---------------------------------------------------------------------------------------- the queue


def new_queue(key: jax.Array, rows: int, dim: int) -> dict[str, jax.Array]:
    """K random keys [K, D] float32, uniform, of a norm of about 1 (C2L's start), and place 0."""
    reach = 1 / math.sqrt(dim / 3)
    keys = jax.random.uniform(key, (rows, dim), jnp.float32, -reach, reach)
    return {"keys": keys, "place": jnp.zeros((), jnp.int32)}


def push(queue: Mapping[str, jax.Array], keys: jax.Array) -> dict[str, jax.Array]:
    """The queue with its oldest rows replaced by `keys` [B, D]; B divides the queue's rows.

    Over a mesh it costs one gather of the keys, as every device holds all of the queue: one a step
    with C2L's 'snapshot', one for each loss with 'sequential', whose next loss needs the queue.
    """
    rows = len(queue["keys"])
    place = queue["place"]
    held = jax.lax.dynamic_update_slice_in_dim(
        queue["keys"], keys.astype(jnp.float32), place, axis=0
    )
    return {"keys": held, "place": (place + len(keys)) % rows}


def scores(q: jax.Array, k: jax.Array, queue: jax.Array) -> jax.Array:
    """[B, 1 + K] dot products of queries [B, D] with their keys [B, D] and a queue [K, D]."""
    own = jnp.sum(q * k, axis=1, keepdims=True)
    others = jnp.einsum("bd,kd->bk", q, queue, precision=HIGHEST)  # BD,KD->BK
    return jnp.concatenate([own, others], axis=1)


def infonce(s: jax.Array, temperature: float) -> jax.Array:
    """Cross-entropy of scores [B, 1 + K] with the first as the target; mean over B."""
    logits = s / temperature
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])


def nce(s: jax.Array, temperature: float, log_z: jax.Array, num_data: int) -> jax.Array:
    """Noise-contrastive estimation of scores [B, 1 + K] with a fixed normaliser (C2L's code).

    o = exp(s / temperature) / z; with P = 1 / num_data and m = K noise samples, the loss is
    -(sum log o_0 / (o_0 + m P) + sum log m P / (o_i + m P)) / B, where the released code adds 1e-7
    to both denominators. Each o_i is about m P / K, so that the logarithms of K quotients near 1
    are summed: as log(1 + exp(x)), which neither rounds the quotients nor overflows.
    """
    log_o = s / temperature - log_z
    m_p = (s.shape[1] - 1) / num_data
    log_m_p = math.log(m_p + NCE_EPS)
    positive = jax.nn.softplus(log_m_p - log_o[:, 0])
    negative = jnp.sum(jax.nn.softplus(log_o[:, 1:] - log_m_p), axis=1)
    # eps is in the denominators alone
    return jnp.mean(positive + negative) + (s.shape[1] - 1) * math.log1p(NCE_EPS / m_p)
