"""MoCo v3 (arXiv 2104.02057): a student's prediction is told from all others of the batch.

BYOL's student, predictor and teacher with InfoNCE in place of the distance: no queue, as the
negatives are the teacher's keys of the other images of a large batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bigmed import losses
from bigmed.models import heads
from bigmed.objectives import base, byol


class Objective(byol.Objective):
    """MoCo v3's loss, 2 temperature (InfoNCE(q1, k2) + InfoNCE(q2, k1)) (section 3, algorithm 1).

    Config (`config.objective`): `temperature`; `head_layers` of the projector, `head_hidden` and
    `head_dim` of it and of the predictor; `predictor_norm`, whether a batch norm ends the
    predictor too (of transformers; not of ResNets); `second_view` and the teacher's, as in BYOL.
    """

    def __init__(self, config: Mapping[str, Any], data: base.DataSpec):
        super().__init__(config, data)
        base.check_negatives(config)
        base.check_temperature(self.config)
        base.check_widths(self.config, "head_layers")

    def make_heads(self) -> tuple[Any, Any]:
        """Dense layers without bias, each with a batch norm, the last norm without parameters."""
        own = self.config
        head = heads.ProjectionHead(
            num_layers=own["head_layers"],
            hidden_dim=own["head_hidden"],
            out_dim=own["head_dim"],
            kernel_init=heads.lecun_init,
            dtype=self.dtype,
        )
        norms = "all" if own["predictor_norm"] else "hidden"
        predictor = head.clone(num_layers=2, norms=norms)
        # A scale that stays 1 is none.
        self.FROZEN = (f"head/norm{own['head_layers']}/scale",)
        if own["predictor_norm"]:
            self.FROZEN += ("predictor/norm2/scale",)
        return head, predictor

    def agreement(
        self, predictions: Sequence[jax.Array], targets: Sequence[jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and metrics; arguments as in BYOL."""
        temperature = self.config["temperature"]
        first, second = (
            losses.infonce(q, k, scale=1 / temperature, weight=1.0)
            for q, k in zip(predictions, targets, strict=True)
        )
        total = 2 * temperature * (first.loss + second.loss)
        metrics = {
            "contrast_loss": total,
            "contrast_accuracy": (first.accuracy + second.accuracy) / 2,
            "contrast_entropy": (first.entropy + second.entropy) / 2,
        }
        return total, metrics
