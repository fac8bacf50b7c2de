"""SimCLR (arXiv 2002.05709): two augmented views of one image attract, all others repel.

This file also shows the contract of an objective, which is all that the training loop knows:

  Objective(config, data)      config: the stage's; data: a `DataSpec`
  IMAGES_PER_EXAMPLE           how many images of one case a row of the batch must hold
  TRANSFER                     patterns of the weights worth carrying to another stage
  SHARDING                     partition rules, see `bigmed.sharding.Rules`
  init(key, batch_spec)        -> (params, batch_stats, extra)
  loss(params, batch_stats, extra, batch, key, train)
                               -> (loss, {'batch_stats', 'metrics', 'carry', 'activations'})
  after_update(params, extra, carry, step) -> extra
  predict_fns()                -> {name: f(state, batch) -> [B, D] float32}

All of them are pure; a batch holds global arrays (`bigmed.data.pipeline`).
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigmed import augment, losses, precision
from bigmed.errors import UserError
from bigmed.models import heads
from bigmed.models.catalogue import build


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What an objective may know of its data before the first batch.

    Attributes:
      class_names: of the label columns; () without labels.
      task: 'single_label', 'multi_label' or 'none'.
    """

    class_names: tuple[str, ...] = ()
    task: str = "none"


class Objective:
    """SimCLR with an online linear probe behind a stop-gradient.

    Config (`config.objective`): `temperature`; `loss_reduction`, 'mean' as in the paper or 'sum' as
    in the released code (twice the paper's); `hidden_norm`; `mask_same_patient`, whether other
    images of an item's patient are left out of its negatives (off in the papers); `head_layers`,
    `head_dim`, `head_hidden` (0: the encoder's width).
    """

    IMAGES_PER_EXAMPLE = 1
    TRANSFER = ("params/(backbone|head)/.*", "batch_stats/.*")

    def __init__(self, config: Mapping[str, Any], data: DataSpec):
        self._config = config["objective"]
        self._data = data
        if self._config["loss_reduction"] not in ("mean", "sum"):
            raise UserError(
                f"config.objective.loss_reduction='{self._config['loss_reduction']}': "
                "valid: mean, sum"
            )
        dtype = precision.compute_dtype(config["precision"])
        self._augment = augment.from_config(config["augment"])
        self.backbone = build(config["model"], dtype)
        self.SHARDING = getattr(sys.modules[type(self.backbone).__module__], "SHARDING", ())
        self._width = self.backbone.feature_dim  # also checks the model's own settings
        self.head = heads.ProjectionHead(
            num_layers=self._config["head_layers"],
            hidden_dim=self._config["head_hidden"] or None,
            out_dim=self._config["head_dim"],
            dtype=dtype,
        )
        labelled = data.class_names and data.task != "none"
        self.probe = heads.LinearHead(len(data.class_names)) if labelled else None

    def init(self, key: jax.Array, batch_spec: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Fresh (params, batch_stats, extra) for batches of this form."""
        size, channels = self._augment.size, batch_spec["image"].shape[-1]
        keys = jax.random.split(key, 3)
        views = jnp.zeros((2, size, size, channels), jnp.float32)
        # initialised in evaluation mode: two images have no useful batch statistics
        backbone = self.backbone.init(keys[0], views, train=False)
        features = jnp.zeros((2, self._width), jnp.float32)
        variables = {"backbone": backbone, "head": self.head.init(keys[1], features, train=False)}
        if self.probe:
            variables["probe"] = self.probe.init(keys[2], features)
        params = {name: v["params"] for name, v in variables.items() if "params" in v}
        stats = {name: v["batch_stats"] for name, v in variables.items() if "batch_stats" in v}
        return params, stats, {}

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        extra: Any,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The loss on a global batch.

        Args:
          params, batch_stats, extra: as `init` gave them.
          batch: image [B, K, H, W, C] uint8 or uint16, box [B, K, 4], labels [B, L], patient [B].
            The first view is drawn from the first of the K images, the second from the last.
          key: of this step.
          train: whether batch statistics are those of the batch, and are updated.

        Returns:
          The scalar loss (contrastive + probe; the probe reaches only its own weights), and aux.
        """
        del extra
        views = self._two_views(batch, key)  # [B, 2, S, S, C]
        b = views.shape[0]
        # The two views of an item stay neighbours, so the rows stay on the device they are on, and
        # one forward pass lets batch statistics cover both views.
        images = views.reshape(2 * b, *views.shape[2:])
        features, stats_backbone = self._apply(
            "backbone", self.backbone, params, batch_stats, images, train
        )
        embeddings, stats_head = self._apply(
            "head", self.head, params, batch_stats, features, train
        )
        z = embeddings.reshape(b, 2, -1)
        contrast = losses.ntxent(
            z[:, 0],
            z[:, 1],
            temperature=self._config["temperature"],
            hidden_norm=self._config["hidden_norm"],
            reduction=self._config["loss_reduction"],
            groups=batch["patient"] if self._config["mask_same_patient"] else None,
        )
        metrics = {
            "contrast_loss": contrast.loss,
            "contrast_accuracy": contrast.accuracy,
            "contrast_entropy": contrast.entropy,
            **losses.embedding_health(embeddings),
        }
        total = contrast.loss
        if self.probe:
            logits = self.probe.apply(
                {"params": params["probe"]}, jax.lax.stop_gradient(features)
            )
            labels = jnp.repeat(batch["labels"], 2, axis=0)
            probe_loss, accuracy = losses.classification(logits, labels, self._data.task)
            metrics |= {"probe_loss": probe_loss, "probe_accuracy": accuracy}
            total = total + probe_loss
        aux = {
            "batch_stats": {**stats_backbone, **stats_head},
            "metrics": metrics,
            "carry": {},
            "activations": {"1_views": views, "2_features": features, "3_embeddings": embeddings},
        }
        return total, aux

    def after_update(self, params: Any, extra: Any, carry: Any, step: jax.Array) -> Any:
        """What the objective keeps beside its parameters after an update; here nothing."""
        del params, carry, step
        return extra

    def predict_fns(self) -> dict[str, Callable[[Any, Mapping[str, jax.Array]], jax.Array]]:
        """'encoder' and 'head_1' ... 'head_k': features after so many layers of the head.

        SimCLR v2's fine-tune-from-layer selector: a head layer includes its BN and ReLU.
        """

        def predictor(layer: int) -> Callable[[Any, Mapping[str, jax.Array]], jax.Array]:
            def predict(state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
                images, boxes = batch["image"][:, 0], batch["box"][:, 0]
                images = augment.eval_transform(self._augment, images, boxes)
                params, stats = state.params, state.batch_stats
                features, _ = self._apply("backbone", self.backbone, params, stats, images, False)
                if not layer:
                    return features
                variables = {"params": params["head"], "batch_stats": stats.get("head", {})}
                return self.head.apply(variables, features, train=False)[1][layer]

            return predict

        layers = range(1, self._config["head_layers"] + 1)
        return {"encoder": predictor(0), **{f"head_{k}": predictor(k) for k in layers}}

    def preprocessing(self) -> dict[str, Any]:
        """What `predict_fns` do to an image; part of the key of cached features."""
        settings = self._augment
        form = {name: getattr(settings, name) for name in augment.PREPROCESSING}
        return {**form, "backbone": repr(self.backbone)}

    def _two_views(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        views = [
            augment.augment(
                self._augment,
                jax.random.fold_in(key, view),
                batch["image"][:, which],
                batch["box"][:, which],
            )
            for view, which in enumerate((0, -1))
        ]
        return jnp.stack(views, axis=1)

    @staticmethod
    def _apply(
        name: str, module: Any, params: Any, batch_stats: Any, x: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The module's first output in float32, and {name: its batch statistics} if it has any."""
        has_stats = name in batch_stats
        variables = {"params": params.get(name, {})}
        if has_stats:
            variables["batch_stats"] = batch_stats[name]
        if train and has_stats:
            (y, _), mutated = module.apply(variables, x, train=True, mutable=["batch_stats"])
            return y.astype(jnp.float32), {name: mutated["batch_stats"]}
        y, _ = module.apply(variables, x, train=train)
        return y.astype(jnp.float32), {name: batch_stats[name]} if has_stats else {}
