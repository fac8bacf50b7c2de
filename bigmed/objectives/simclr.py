"""SimCLR (arXiv 2002.05709): two augmented views of one image attract, all others repel."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from bigmed import losses
from bigmed.errors import UserError
from bigmed.models import heads
from bigmed.objectives import base


class Objective(base.Objective):
    """SimCLR with an online linear probe behind a stop-gradient.

    Config (`config.objective`): `temperature`; `loss_reduction`, 'mean' as in the paper or 'sum' as
    in the released code (twice the paper's); `hidden_norm`; `mask_same_patient`, whether other
    images of an item's patient are left out of its negatives (off in the papers); `head_layers`,
    `head_dim`, `head_hidden` (0: the encoder's width).
    """

    def __init__(self, config: Mapping[str, Any], data: base.DataSpec):
        super().__init__(config, data)
        if self.config["loss_reduction"] not in ("mean", "sum"):
            raise UserError(
                f"config.objective.loss_reduction='{self.config['loss_reduction']}': "
                "valid: mean, sum"
            )
        base.check_negatives(config)
        base.check_temperature(self.config)
        base.check_widths(self.config, "head_dim")
        self.head = heads.ProjectionHead(
            num_layers=self.config["head_layers"],
            hidden_dim=self.config["head_hidden"] or None,
            out_dim=self.config["head_dim"],
            dtype=self.dtype,
        )

    def init(self, key: jax.Array, batch_spec: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Fresh (params, batch_stats, extra) for batches of this form."""
        return *self.init_modules(key, batch_spec, head=(self.head, self.width)), {}

    def embed(
        self, params: Any, batch_stats: Any, extra: Any, views: jax.Array, key: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Views [B, 2, S, S, C] -> the backbone's features [B, 2, D] float32."""
        del extra, key
        b = views.shape[0]
        # The two views of an item stay neighbours, so the rows stay on the device they are on, and
        # one forward pass lets batch statistics cover both views.
        images = views.reshape(2 * b, *views.shape[2:])
        features, stats = base.apply("backbone", self.backbone, params, batch_stats, images, train)
        return features.reshape(b, 2, -1), stats

    def compare(
        self, params: Any, batch_stats: Any, extra: Any, outputs: jax.Array,
        batch: Mapping[str, jax.Array], key: jax.Array, train: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:  # fmt: skip
        """NT-Xent of the projected features, plus the probe's loss, which reaches only itself."""
        del extra, key
        b = outputs.shape[0]
        features = outputs.reshape(2 * b, -1)
        embeddings, stats = base.apply("head", self.head, params, batch_stats, features, train)
        z = embeddings.reshape(b, 2, -1)
        contrast = losses.ntxent(
            z[:, 0],
            z[:, 1],
            temperature=self.config["temperature"],
            hidden_norm=self.config["hidden_norm"],
            reduction=self.config["loss_reduction"],
            groups=batch["patient"] if self.config["mask_same_patient"] else None,
        )
        probe_loss, probe_metrics = self.probe_loss(params, outputs, batch["labels"])
        metrics = {
            "contrast_loss": contrast.loss,
            "contrast_accuracy": contrast.accuracy,
            "contrast_entropy": contrast.entropy,
            **losses.embedding_health(embeddings),
            **probe_metrics,
        }
        aux = {
            "batch_stats": stats,
            "metrics": metrics,
            "carry": {},
            "activations": {"3_embeddings": embeddings},
        }
        return contrast.loss + probe_loss, aux

    def predict_fns(self) -> dict[str, Callable[[Any, Mapping[str, jax.Array]], jax.Array]]:
        """'encoder' and 'head_1' ... 'head_k': features after so many layers of the head.

        SimCLR v2's fine-tune-from-layer selector: a head layer includes its BN and ReLU.
        """

        def head_layer(layer: int) -> Callable[[Any, Mapping[str, jax.Array]], jax.Array]:
            def predict(state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
                stats = state.batch_stats.get("head", {})
                variables = {"params": state.params["head"], "batch_stats": stats}
                features = self.features(state, batch)
                return self.head.apply(variables, features, train=False)[1][layer]

            return predict

        layers = range(1, self.config["head_layers"] + 1)
        return {**super().predict_fns(), **{f"head_{k}": head_layer(k) for k in layers}}
