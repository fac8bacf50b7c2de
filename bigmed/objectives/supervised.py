"""Supervised classification: a linear head on the encoder, both trained (`evaluators.finetune`)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigmed import augment, statistics
from bigmed.errors import UserError
from bigmed.models import heads
from bigmed.objectives import base

_DROPOUT, _MIXUP = 11, 12  # numbers of the draws of a step


class Objective(base.Objective):
    """Softmax or independent sigmoids on one augmented view of each image.

    Images and labels without a target are left out. With `uncertain='three_class'` each class has
    three logits, of absent, present and uncertain.

    Config (`config.objective`): `uncertain`, a label policy of `bigmed.statistics`;
    `class_weights`, () or one a class, of its images (single_label) or of its positives
    (multi_label); `dropout`, rate before the head; `batch_norm`, 'train', or 'frozen' for the
    statistics of the weights that it starts from; `mixup`, alpha of the beta distribution, 0 for
    none (arXiv 1710.09412; one lambda a step); `from_layer`, how many layers of the `projection`
    head are kept (SimCLR v2's selector, arXiv 2006.10029), whose settings are those of
    `heads.ProjectionHead`.
    """

    TRANSFER = ("params/(backbone|head)/.*", "batch_stats/(backbone|head)/.*")
    LEARNS_FROM = "labels"

    def __init__(self, config: Mapping[str, Any], data: base.DataSpec):
        super().__init__(config, data)
        settings, self.probe = self.config, None
        if not data.class_names or data.task not in statistics.TASKS:
            raise UserError(f"objective 'supervised' needs labels; the data's task is {data.task}")
        if settings["batch_norm"] not in ("train", "frozen"):
            raise UserError(f"batch_norm='{settings['batch_norm']}': valid: train, frozen")
        if not 0 <= settings["dropout"] < 1 or settings["mixup"] < 0:
            raise UserError(
                f"dropout={settings['dropout']}, mixup={settings['mixup']}: valid: dropout from 0, "
                "below 1; mixup 0 and more"
            )
        num_classes, weights = len(data.class_names), tuple(settings["class_weights"])
        if len(weights) not in (0, num_classes):
            raise UserError(f"class_weights has {len(weights)} values for {num_classes} classes")
        self.class_weights = jnp.asarray(weights or (1.0,) * num_classes, jnp.float32)
        self.three_class = settings["uncertain"] == "three_class"
        if self.three_class and data.task != "multi_label":
            raise UserError(f"uncertain='three_class' is of task multi_label, not {data.task}")
        self.classifier = heads.LinearHead(num_classes * (3 if self.three_class else 1), True)
        self.head = None
        if settings["from_layer"]:
            projection = dict(settings["projection"], up_to=settings["from_layer"])
            self.head = heads.ProjectionHead(**projection, dtype=self.dtype)

    def init(self, key: jax.Array, batch_spec: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Fresh (params, batch_stats, extra) for batches of this form; the classifier is zero."""
        modules, width = {}, self.width
        if self.head:
            modules["head"] = (self.head, width)
            whole = self.head.up_to == self.head.num_layers
            width = self.head.out_dim if whole else self.head.hidden_dim or width
        params, stats = self.init_modules(key, batch_spec, **modules)
        classifier = self.classifier.init(key, jnp.zeros((2, width), jnp.float32))
        return {**params, "classifier": classifier["params"]}, stats, {}

    def prepare(self, batch: Mapping[str, jax.Array], key: jax.Array, train: bool) -> jax.Array:
        """Views [B, S, S, C] float32; in training augmented, and mixed where that is asked for."""
        image, box = batch["image"][:, 0], batch["box"][:, 0]
        if not train:
            return augment.eval_transform(self.augmentation, image, box)
        views = augment.augment(self.augmentation, key, image, box)
        if not self.config["mixup"]:
            return views
        share, order = self._mix(key, len(views))
        return share * views + (1 - share) * views[order]

    def embed(
        self, params: Any, batch_stats: Any, extra: Any, views: jax.Array, key: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Views [B, S, S, C] -> what the classifier takes, [B, D] float32."""
        del extra, key
        return self._encode(params, batch_stats, views, train)

    def compare(
        self, params: Any, batch_stats: Any, extra: Any, outputs: jax.Array,
        batch: Mapping[str, jax.Array], key: jax.Array, train: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:  # fmt: skip
        """Weighted cross-entropy over what is labelled."""
        del extra
        rate, labels = self.config["dropout"], batch["labels"]
        if train and rate:
            kept = jax.random.bernoulli(jax.random.fold_in(key, _DROPOUT), 1 - rate, outputs.shape)
            outputs = jnp.where(kept, outputs / (1 - rate), 0.0)
        logits = self.classifier.apply({"params": params["classifier"]}, outputs)
        loss = self.cross_entropy(logits, labels)
        if train and self.config["mixup"]:
            share, order = self._mix(key, len(labels))
            loss = share * loss + (1 - share) * self.cross_entropy(logits, labels[order])
        aux = {
            "batch_stats": batch_stats,
            "metrics": {},
            "carry": {},
            "activations": {"3_logits": logits},
        }
        return loss, aux

    def cross_entropy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """The mean over what is labelled, weighted by class, a scalar; 0 where nothing is.

        Args:
          logits: float32 [B, L], or [B, 3 L] with three classes each.
          labels: int [B, L], codes of `bigmed.data.schema`.
        """
        weights = self.class_weights
        if self.three_class:
            logits = logits.reshape(*labels.shape, 3)
            index = jnp.where(labels == statistics.UNCERTAIN, 2, jnp.maximum(labels, 0))
            losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), index[..., None], axis=2)
            known = (labels >= statistics.UNCERTAIN).astype(jnp.float32)
            weight = known * jnp.where(labels == 1, weights[None], 1.0)
            return jnp.sum(weight * losses[..., 0]) / jnp.maximum(jnp.sum(known), 1.0)
        if self.data.task == "single_label":
            known = jnp.max(labels, axis=1) == 1  # [B]
            target = jnp.argmax(labels, axis=1)
            weight = known * weights[target]
            losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)
            # over the weights, as torch.nn.CrossEntropyLoss
            total = jnp.sum(weight)
            return jnp.sum(weight * losses[:, 0]) / jnp.where(total > 0, total, 1.0)
        targets = self._targets(labels)
        known = (targets >= 0).astype(jnp.float32)  # [B, L]
        positive, negative = jax.nn.softplus(-logits), jax.nn.softplus(logits)
        losses = weights[None] * targets * positive + (1 - targets) * negative
        # over the labels, as torch.nn.BCEWithLogitsLoss with pos_weight
        return jnp.sum(known * losses) / jnp.maximum(jnp.sum(known), 1.0)

    def predict_fns(self) -> dict[str, Callable[[Any, Mapping[str, jax.Array]], jax.Array]]:
        """'encoder', and 'probabilities' [B, L]; with three classes present / (absent + present).
        """
        return {**super().predict_fns(), "probabilities": self.probabilities}

    def probabilities(self, state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B, L] float32 of each row's first image, in evaluation."""
        views = self.prepare(batch, jax.random.key(0), False)
        outputs, _ = self._encode(state.params, state.batch_stats, views, False)
        logits = self.classifier.apply({"params": state.params["classifier"]}, outputs)
        if self.three_class:
            logits = logits.reshape(len(logits), -1, 3)
            return jax.nn.sigmoid(logits[..., 1] - logits[..., 0])
        if self.data.task == "single_label":
            return jax.nn.softmax(logits)
        return jax.nn.sigmoid(logits)

    def _encode(
        self, params: Any, batch_stats: Any, views: jax.Array, train: bool
    ) -> tuple[jax.Array, Any]:
        learning = train and self.config["batch_norm"] == "train"
        x, stats = base.apply("backbone", self.backbone, params, batch_stats, views, learning)
        if self.head:
            x, stats = base.apply("head", self.head, params, stats, x, learning)
        return x, stats

    def _targets(self, labels: jax.Array) -> jax.Array:
        """[B, L] from 0 to 1, negative where nothing is learnt."""
        counts_as = {"zeros": 0.0, "ones": 1.0, "smooth": statistics.SMOOTH_TARGET}
        uncertain = counts_as.get(self.config["uncertain"], -1.0)
        return jnp.where(labels == statistics.UNCERTAIN, uncertain, labels.astype(jnp.float32))

    def _mix(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """A step's (lambda, permutation of the rows), alike in `prepare` and `compare`."""
        share_key, order_key = jax.random.split(jax.random.fold_in(key, _MIXUP))
        alpha = self.config["mixup"]
        return jax.random.beta(share_key, alpha, alpha), jax.random.permutation(order_key, count)
