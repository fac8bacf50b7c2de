"""C2L (arXiv 2007.07423): momentum contrast of images, mixed images and mixed features.

A student's query of one view, or of a mixture of two images' views, is pulled to the teacher's key
of the other view, of the same mixture, or to the mixture of two teachers' keys; everything in the
queue is pushed away. With the first of the three losses alone it is MoCo (arXiv 1911.05722).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigmed import losses, networks
from bigmed.errors import UserError, did_you_mean
from bigmed.models import heads, layers
from bigmed.objectives import base, momentum

NAMES = ("plain", "image_mix", "feature_mix")  # the three losses, in order
MODES = ("nce", "infonce")
QUEUES = ("sequential", "snapshot")
HEADS = ("linear", "mlp")
UNSET = -1e30  # of the normaliser's logarithm; finite, as all of a state is
_MIX, _SHUFFLE = 2, 3  # streams of a step's key; 0 and 1 are the views'


class Features(NamedTuple):
    """The encoders' outputs, [B, D] float32, or None where no loss needs them."""

    query: jax.Array | None  # student, first view
    key: jax.Array  # teacher, second view
    mixed_query: jax.Array | None  # student, mixed first views
    mixed_key: jax.Array | None  # teacher, mixed second views


class Objective(momentum.Objective):
    """C2L as released, and the variants that its ablations need.

    Config (`config.objective`): `losses`, which of 'plain', 'image_mix' and 'feature_mix' are
    averaged; `mode`, 'nce' with a normaliser fixed at the first step (as the released command
    trains) or 'infonce'; `temperature`; `queue_size`; `queue`, 'sequential': each loss pushes its
    keys at once, so that the next one meets them (as released, one push for each loss), or
    'snapshot': all are scored against one queue, then the plain keys are pushed; `head`, 'linear'
    or 'mlp', and `head_dim`; `bn_groups`, in how many groups of a batch, shuffled for the teacher,
    `layers.BatchNorm` takes its statistics (1: over the whole batch): MoCo's shuffled batch norm
    without its devices.
    """

    def __init__(self, config: Mapping[str, Any], data: base.DataSpec):
        super().__init__(config, data)
        base.check_temperature(self.config)
        base.check_widths(self.config, "head_dim")
        own, batch = self.config, config["data"]["batch_size"]
        for key, choices in (("mode", MODES), ("queue", QUEUES), ("head", HEADS)):
            if own[key] not in choices:
                raise UserError(
                    f"config.objective.{key}='{own[key]}': {did_you_mean(own[key], choices)}"
                )
        self._active = tuple(name for name in NAMES if name in own["losses"])
        if not self._active or len(self._active) != len(own["losses"]):
            raise UserError(
                f"config.objective.losses={tuple(own['losses'])}: valid: some of {', '.join(NAMES)}"
            )
        if own["queue_size"] < batch or own["queue_size"] % batch:
            raise UserError(
                f"config.objective.queue_size={own['queue_size']} is no multiple of "
                f"config.data.batch_size={batch}, which is pushed at once"
            )
        part = batch // config["micro_batch"]["count"]
        if own["bn_groups"] < 1 or part % own["bn_groups"]:
            raise UserError(
                f"config.objective.bn_groups={own['bn_groups']} does not divide the {part} images "
                "of a batch or micro-batch"
            )
        # Every device needs all of the queue at every step: kept whole, it is gathered at none.
        self.SHARDING = (*self.SHARDING, (r"queue/keys", (None, None)))
        self.head = heads.ProjectionHead(
            num_layers=2 if own["head"] == "mlp" else 1,
            out_dim=own["head_dim"],
            norms="none",
            biases="all",
            kernel_init=heads.lecun_init,
            dtype=self.dtype,
        )

    def init(self, key: jax.Array, batch_spec: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Fresh (params, batch_stats, extra); the teacher begins as the student."""
        init_key, queue_key = jax.random.split(key)
        params, stats = self.init_modules(init_key, batch_spec, head=(self.head, self.width))
        stats, followers = self.with_teacher(params, stats, "backbone", "head")
        queue = momentum.new_queue(queue_key, self.config["queue_size"], self.config["head_dim"])
        extra = {"teacher": followers, "queue": queue, "log_z": jnp.array(UNSET, jnp.float32)}
        return params, stats, extra

    def prepare(self, batch: Mapping[str, jax.Array], key: jax.Array, train: bool) -> jax.Array:
        """Two views, and where a loss needs them their mixtures: [B, 2 or 4, S, S, C]."""
        views = super().prepare(batch, key, train)
        if self._active == ("plain",):
            return views
        share, order = mixture(key, len(views))
        return jnp.concatenate([views, mixed(views, share, order)], axis=1)

    def embed(
        self, params: Any, batch_stats: Any, extra: Any, inputs: jax.Array, key: jax.Array,
        train: bool,
    ) -> tuple[Features, Any]:  # fmt: skip
        """The student's and the teacher's features of any rows' views.

        As in the released code each kind of view is a forward pass with batch statistics of its
        own, and the teacher's passes share one shuffle.
        """
        followers = jax.lax.stop_gradient(extra["teacher"])
        shuffle = jax.random.permutation(jax.random.fold_in(key, _SHUFFLE), len(inputs))
        stats = batch_stats

        def student(view: int, stats: Any) -> tuple[jax.Array, Any]:
            return self._encode("backbone", params, stats, inputs[:, view], train)

        def teacher(view: int, stats: Any) -> tuple[jax.Array, Any]:
            name, images = networks.teacher("backbone"), inputs[:, view]
            if self.config["bn_groups"] == 1 or not train:
                return self._encode(name, followers, stats, images, train)
            features, stats = self._encode(name, followers, stats, images[shuffle], train)
            return features[jnp.argsort(shuffle)], stats

        query = mixed_query = mixed_key = None
        if "plain" in self._active:
            query, stats = student(0, stats)
        plain_key, stats = teacher(1, stats)
        if self._active != ("plain",):
            mixed_query, stats = student(2, stats)
        if "image_mix" in self._active:
            mixed_key, stats = teacher(3, stats)
        keys = jax.lax.stop_gradient((plain_key, mixed_key))
        return Features(query, keys[0], mixed_query, keys[1]), stats

    def compare(
        self, params: Any, batch_stats: Any, extra: Any, outputs: Features,
        batch: Mapping[str, jax.Array], key: jax.Array, train: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:  # fmt: skip
        """The mean of the active losses, plus the probe's, which reaches only itself."""
        del train

        def project(weights: Any, features: jax.Array | None) -> jax.Array | None:
            if features is None:
                return None
            return self.head.apply({"params": weights}, features, train=True)[0]

        followers = jax.lax.stop_gradient(extra["teacher"][networks.teacher("head")])
        query, mixed_query = (
            project(params["head"], f) for f in (outputs.query, outputs.mixed_query)
        )
        plain_key, mixed_key = (project(followers, f) for f in (outputs.key, outputs.mixed_key))
        share, order = mixture(key, len(plain_key))
        keys = {
            "plain": plain_key,
            "image_mix": mixed_key,
            "feature_mix": mixed(plain_key, share, order),  # before they are normalised
        }
        queries = {"plain": query, "image_mix": mixed_query, "feature_mix": mixed_query}
        pairs = {
            name: (losses.l2_normalize(queries[name]), losses.l2_normalize(keys[name]))
            for name in self._active
        }
        total, metrics, carry = self._contrast(pairs, losses.l2_normalize(plain_key), extra)
        shown = queries[self._active[0]]
        features = outputs.query if outputs.query is not None else outputs.mixed_query
        probe_loss, probe_metrics = self.probe_loss(params, features[:, None], batch["labels"])
        metrics |= {
            "mix_share": share, **losses.embedding_health(shown), **probe_metrics,
        }  # fmt: skip
        activations = {"3_queries": shown, "4_keys": plain_key}
        aux = {
            "batch_stats": batch_stats,
            "metrics": metrics,
            "carry": jax.lax.stop_gradient(carry),
            "activations": activations,
        }
        return total + probe_loss, aux

    def _contrast(
        self, pairs: Mapping[str, tuple[jax.Array, jax.Array]], plain_key: jax.Array, extra: Any
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """(mean loss, metrics, the queue and normalisers after it)."""
        queue, log_z, metrics = extra["queue"], extra["log_z"], {}
        for name, (q, k) in pairs.items():
            s = momentum.scores(q, k, queue["keys"])
            if self.config["mode"] == "nce":
                log_z = self._log_normaliser(s, log_z)
                metrics[f"{name}_loss"] = momentum.nce(
                    s, self.config["temperature"], log_z, self.data.num_examples
                )
            else:
                metrics[f"{name}_loss"] = momentum.infonce(s, self.config["temperature"])
            metrics[f"{name}_accuracy"] = jnp.mean(s[:, 0] > jnp.max(s[:, 1:], axis=1))
            if self.config["queue"] == "sequential":
                queue = momentum.push(queue, jax.lax.stop_gradient(k))
        if self.config["queue"] == "snapshot":
            queue = momentum.push(queue, plain_key)
        total = sum(metrics[f"{name}_loss"] for name in pairs) / len(pairs)
        metrics["contrast_loss"] = total
        metrics["contrast_accuracy"] = metrics[f"{next(iter(pairs))}_accuracy"]
        return total, metrics, {"queue": queue, "log_z": log_z}

    def _log_normaliser(self, s: jax.Array, log_z: jax.Array) -> jax.Array:
        """The one that is fixed, or at the very first loss mean(exp(s / T)) times the images."""
        logits = jax.lax.stop_gradient(s) / self.config["temperature"]
        first = jax.nn.logsumexp(logits) + math.log(self.data.num_examples / s.size)
        return jnp.where(log_z == UNSET, first, log_z)

    def after_update(self, params: Any, extra: Any, carry: Any, step: jax.Array) -> Any:
        """The queue with the new keys, and the teacher a step nearer to the student."""
        return {**carry, "teacher": self.move_teacher(params, extra["teacher"], step)}

    def _encode(
        self, name: str, params: Any, stats: Any, images: jax.Array, train: bool
    ) -> tuple[jax.Array, Any]:
        """Features of images [B, S, S, C], batch statistics taken in groups of the rows."""
        with layers.batch_norm_in_groups(self.config["bn_groups"]):
            return base.apply(name, self.backbone, params, stats, images, train)


def mixture(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """A step's (lambda, permutation): lambda = max(u, 1 - u) with u ~ Beta(1, 1), one a batch."""
    share_key, order_key = jax.random.split(jax.random.fold_in(key, _MIX))
    u = jax.random.uniform(share_key)
    return jnp.maximum(u, 1 - u), jax.random.permutation(order_key, count)


def mixed(x: jax.Array, share: jax.Array, order: jax.Array) -> jax.Array:
    """lambda x + (1 - lambda) x[permutation], over rows."""
    return share * x + (1 - share) * x[order]
