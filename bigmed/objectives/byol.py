"""BYOL (arXiv 2006.07733): a student predicts its teacher's projection of another view.

There are no negatives. What keeps the embeddings apart is the predictor and the slow teacher.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigmed import augment, losses, networks
from bigmed.models import heads
from bigmed.objectives import base, momentum


class Features(NamedTuple):
    """The student's and the teacher's features of both views, [B, 2, D] float32."""

    student: jax.Array
    teacher: jax.Array


class Objective(momentum.Objective):
    """BYOL's loss in both directions, summed as in the paper (equation 2 and below).

    Config (`config.objective`): `head_hidden` and `head_dim` of the projector and the predictor;
    `second_view`, what the second view's augmentation has unlike `config.augment`; the teacher's
    `momentum` and its schedule, see `bigmed.objectives.momentum`.
    """

    def __init__(self, config: Mapping[str, Any], data: base.DataSpec):
        super().__init__(config, data)
        base.check_widths(self.config, "head_hidden", "head_dim")
        second = augment.from_config({**config["augment"], **self.config["second_view"]})
        self._augmentations = (self.augmentation, second)
        self.head, self.predictor = self.make_heads()

    def make_heads(self) -> tuple[Any, Any]:
        """The projector, which the teacher has too, and the predictor (section 3.3)."""
        head = heads.ProjectionHead(
            hidden_dim=self.config["head_hidden"],
            out_dim=self.config["head_dim"],
            norms="hidden",
            biases="hidden",
            kernel_init=heads.lecun_init,
            dtype=self.dtype,
        )
        return head, head.clone()

    def agreement(
        self, predictions: Sequence[jax.Array], targets: Sequence[jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """2 - 2 cos(prediction, target), summed over the two directions; mean over the batch.

        Args:
          predictions: of the two views, each [B, D].
          targets: the teacher's projections of the other views, each [B, D], without gradient.

        Returns:
          The loss and metrics.
        """
        cosines = [
            jnp.sum(losses.l2_normalize(p) * losses.l2_normalize(t), axis=1)
            for p, t in zip(predictions, targets, strict=True)
        ]
        total = jnp.mean(4 - 2 * cosines[0] - 2 * cosines[1])
        return total, {"prediction_loss": total}

    def init(self, key: jax.Array, batch_spec: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Fresh (params, batch_stats, extra); the teacher begins as the student."""
        params, stats = self.init_modules(
            key,
            batch_spec,
            head=(self.head, self.width),
            predictor=(self.predictor, self.config["head_dim"]),
        )
        stats, followers = self.with_teacher(params, stats, "backbone", "head")
        return params, stats, {"teacher": followers}

    def prepare(self, batch: Mapping[str, jax.Array], key: jax.Array, train: bool) -> jax.Array:
        """Two views of each row, each by its own augmentation: [B, 2, S, S, C] float32."""
        del train
        views = [
            augment.augment(
                augmentation,
                jax.random.fold_in(key, view),
                batch["image"][:, which],
                batch["box"][:, which],
            )
            for view, (which, augmentation) in enumerate(
                zip((0, -1), self._augmentations, strict=True)
            )
        ]
        return jnp.stack(views, axis=1)

    def embed(
        self, params: Any, batch_stats: Any, extra: Any, views: jax.Array, key: jax.Array,
        train: bool,
    ) -> tuple[Features, Any]:  # fmt: skip
        """Views [B, 2, S, S, C] -> features; each view is a pass with statistics of its own."""
        del key
        followers, stats = jax.lax.stop_gradient(extra["teacher"]), batch_stats
        found: dict[str, list[jax.Array]] = {"backbone": [], networks.teacher("backbone"): []}
        for name, weights in (("backbone", params), (networks.teacher("backbone"), followers)):
            for view in range(2):
                features, stats = base.apply(
                    name, self.backbone, weights, stats, views[:, view], train
                )
                found[name].append(features)
        student, teacher = (jnp.stack(features, axis=1) for features in found.values())
        return Features(student, jax.lax.stop_gradient(teacher)), stats

    def compare(
        self, params: Any, batch_stats: Any, extra: Any, outputs: Features,
        batch: Mapping[str, jax.Array], key: jax.Array, train: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:  # fmt: skip
        """The agreement of either view's prediction with the other's target, plus the probe's."""
        del key
        followers, stats = jax.lax.stop_gradient(extra["teacher"]), batch_stats
        projections, predictions, targets = [], [], []
        for view in range(2):
            z, stats = base.apply(
                "head", self.head, params, stats, outputs.student[:, view], train
            )
            p, stats = base.apply("predictor", self.predictor, params, stats, z, train)
            name, features = networks.teacher("head"), outputs.teacher[:, view]
            target, stats = base.apply(name, self.head, followers, stats, features, train)
            projections.append(z)
            predictions.append(p)
            targets.append(jax.lax.stop_gradient(target))
        total, metrics = self.agreement(predictions, targets[::-1])
        probe_loss, probe_metrics = self.probe_loss(params, outputs.student, batch["labels"])
        aux = {
            "batch_stats": stats,
            "metrics": {
                **metrics,
                **losses.embedding_health(jnp.concatenate(projections)),
                **probe_metrics,
            },
            "carry": {},
            "activations": {"3_predictions": predictions, "4_targets": targets},
        }
        return total + probe_loss, aux

    def after_update(self, params: Any, extra: Any, carry: Any, step: jax.Array) -> Any:
        """The teacher a step nearer to the student."""
        del carry
        return {"teacher": self.move_teacher(params, extra["teacher"], step)}
