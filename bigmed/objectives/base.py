"""The contract of an objective, which is all that the training loop knows, and what many share.

  Objective(config, data)      config: the stage's; data: a `DataSpec`
  IMAGES_PER_EXAMPLE           how many images of one case a row of the batch may hold, a tuple
  TRANSFER                     patterns of the weights worth carrying to another stage
  SHARDING                     partition rules, see `bigmed.sharding.Rules`
  FROZEN                       patterns of parameters that it never trains
  init(key, batch_spec)        -> (params, batch_stats, extra)
  prepare(batch, key, train)   -> inputs: what the encoders take; rows as those of the batch
  embed(params, batch_stats, extra, inputs, key, train)
                               -> (outputs, batch_stats): the encoders, for any share of the rows
  compare(params, batch_stats, extra, outputs, batch, key, train)
                               -> (loss, aux): heads and loss, which see the whole batch; aux has
                               'batch_stats', 'metrics', 'carry' (for `after_update`) and
                               'activations', whose names sort in the order of computation
  loss(params, batch_stats, extra, batch, key, train) -> (loss, aux): the three in a row
  after_update(params, extra, carry, step) -> extra
  handed_over(params, batch_stats, extra)
                               -> (batch_stats, extra): what follows from parameters and statistics
                               that were taken from elsewhere
  predict_fns()                -> {name: f(state, batch) -> [B, D] float32}
  OF_TEXTS                     names of those that read the batch's texts
  LEARNS_FROM                  'labels', 'reports', or '': images alone
  scale(params)                -> 1 / temperature of similarities of images and texts, where there
                               are such names
  preprocessing()              what `predict_fns` do to an image

All of them are pure; a batch holds global arrays (`bigmed.data.pipeline`). The cut between `embed`
and `compare` is what lets `bigmed.step` pass a batch through the encoders in parts and still take
the gradient of the loss of the whole of it.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigmed import augment, losses, precision
from bigmed.errors import UserError
from bigmed.models import heads
from bigmed.models.catalogue import build

EMBED_STREAM = 2**16  # folded into a step's key for `embed`, plus the number of the micro-batch


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What an objective may know of its data before the first batch.

    Attributes:
      class_names: of the label columns; () without labels.
      task: 'single_label', 'multi_label' or 'none'.
      num_examples: how many units (images, or cases) an epoch has.
      total_steps: of the stage.
      tokeniser: of the texts (`bigmed.data.tokenise.Tokeniser`), or None without.
    """

    class_names: tuple[str, ...] = ()
    task: str = "none"
    num_examples: int = 0
    total_steps: int = 0
    tokeniser: Any = None


class Objective:
    """The image encoder, its augmentation and an online linear probe behind a stop-gradient.

    An objective derives from it and adds `init`, `embed`, `compare` and, where it keeps something
    beside its parameters, `after_update`.
    """

    IMAGES_PER_EXAMPLE: tuple[int, ...] = (1,)
    TRANSFER = ("params/(backbone|head)/.*", "batch_stats/(backbone|head)/.*")
    FROZEN: tuple[str, ...] = ()
    OF_TEXTS: tuple[str, ...] = ()
    LEARNS_FROM = ""

    def __init__(self, config: Mapping[str, Any], data: DataSpec):
        self.config = config["objective"]
        self.data = data
        self.dtype = precision.compute_dtype(config["precision"])
        self.augmentation = augment.from_config(config["augment"])
        self.backbone = build(config["model"], self.dtype)
        self.SHARDING = getattr(sys.modules[type(self.backbone).__module__], "SHARDING", ())
        self.width = self.backbone.feature_dim  # also checks the model's own settings
        labelled = data.class_names and data.task != "none"
        self.probe = heads.LinearHead(len(data.class_names)) if labelled else None

    # ------------------------------------------------------------------- the contract's own pieces

    def prepare(self, batch: Mapping[str, jax.Array], key: jax.Array, train: bool) -> jax.Array:
        """Two augmented views of each row, [B, 2, S, S, C] float32.

        Args:
          batch: image [B, K, H, W, C] uint8 or uint16 and box [B, K, 4]. The first view is drawn
            from the first of the K images, the second from the last.
          key: of this step.
          train: unused, as the loss needs two different views in evaluation too.
        """
        del train
        views = [
            augment.augment(
                self.augmentation,
                jax.random.fold_in(key, view),
                batch["image"][:, which],
                batch["box"][:, which],
            )
            for view, which in enumerate((0, -1))
        ]
        return jnp.stack(views, axis=1)

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        extra: Any,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The loss on a global batch, and aux: see the module's docstring.

        Args:
          params, batch_stats, extra: as `init` gave them.
          batch: image [B, K, H, W, C], box [B, K, 4], labels [B, L], patient [B], index [B].
          key: of this step.
          train: whether batch statistics are those of the batch, and are updated.
        """
        inputs = self.prepare(batch, key, train)
        embed_key = jax.random.fold_in(key, EMBED_STREAM)
        outputs, stats = self.embed(params, batch_stats, extra, inputs, embed_key, train)
        loss, aux = self.compare(params, stats, extra, outputs, batch, key, train)
        activations = {"1_inputs": inputs, "2_outputs": outputs, **aux["activations"]}
        return loss, {**aux, "activations": activations}

    def after_update(self, params: Any, extra: Any, carry: Any, step: jax.Array) -> Any:
        """What the objective keeps beside its parameters after an update; here nothing."""
        del params, carry, step
        return extra

    def handed_over(self, params: Any, batch_stats: Any, extra: Any) -> tuple[Any, Any]:
        """What follows from weights that were taken from elsewhere; here nothing."""
        del params
        return batch_stats, extra

    def predict_fns(self) -> dict[str, Callable[[Any, Mapping[str, jax.Array]], jax.Array]]:
        """'encoder': the backbone's features of each row's first image, [B, D]."""
        return {"encoder": self.features}

    def preprocessing(self) -> dict[str, Any]:
        """What `predict_fns` do to an image; part of the key of cached features."""
        form = {name: getattr(self.augmentation, name) for name in augment.PREPROCESSING}
        return {**form, "backbone": repr(self.backbone)}

    # ------------------------------------------------------------------------ for those who derive

    def init_modules(self, key: jax.Array, batch_spec: Mapping[str, Any], **modules: Any) -> Any:
        """Fresh (params, batch_stats) of the backbone, the probe and further modules.

        Args:
          key: of the initialisation.
          batch_spec: of the batches.
          **modules: by name, (module, width of the features that it takes).
        """
        size, channels = self.augmentation.size, batch_spec["image"].shape[-1]
        views = jnp.zeros((2, size, size, channels), jnp.float32)
        # in evaluation mode: two images have no useful batch statistics
        keys = jax.random.split(key, 2 + len(modules))
        variables = {"backbone": self.backbone.init(keys[0], views, train=False)}
        for own_key, (name, (module, width)) in zip(keys[1:-1], modules.items(), strict=True):
            features = jnp.zeros((2, width), jnp.float32)
            variables[name] = module.init(own_key, features, train=False)
        if self.probe:
            variables["probe"] = self.probe.init(keys[-1], jnp.zeros((2, self.width), jnp.float32))
        params = {name: v["params"] for name, v in variables.items() if "params" in v}
        stats = {name: v["batch_stats"] for name, v in variables.items() if "batch_stats" in v}
        return params, stats

    def features(self, state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The backbone's features [B, D] float32 of each row's first image, in evaluation."""
        images, boxes = batch["image"][:, 0], batch["box"][:, 0]
        images = augment.eval_transform(self.augmentation, images, boxes)
        params, stats = state.params, state.batch_stats
        return apply("backbone", self.backbone, params, stats, images, False)[0]

    def probe_loss(
        self, params: Any, features: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array | float, dict[str, jax.Array]]:
        """(loss, metrics) of the online probe, whose gradient reaches its own weights alone.

        Args:
          params: the objective's.
          features: [B, V, D], of V views of each row.
          labels: [B, L].
        """
        if not self.probe:
            return 0.0, {}
        b, v, d = features.shape
        features = jax.lax.stop_gradient(features).reshape(b * v, d)
        logits = self.probe.apply({"params": params["probe"]}, features)
        labels = jnp.repeat(labels, v, axis=0)
        loss, accuracy = losses.classification(logits, labels, self.data.task)
        return loss, {"probe_loss": loss, "probe_accuracy": accuracy}


def apply(
    name: str, module: Any, params: Any, batch_stats: Any, x: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """The first output, float32, of the module whose weights stand under `name`.

    Returns:
      The output, and all batch statistics, those of this module as they are after it.
    """
    variables = {"params": params.get(name, {})}
    if name not in batch_stats:
        y, _ = module.apply(variables, x, train=train)
        return y.astype(jnp.float32), batch_stats
    variables["batch_stats"] = batch_stats[name]
    if not train:
        y, _ = module.apply(variables, x, train=False)
        return y.astype(jnp.float32), batch_stats
    (y, _), mutated = module.apply(variables, x, train=True, mutable=["batch_stats"])
    return y.astype(jnp.float32), {**batch_stats, name: mutated["batch_stats"]}


def check_widths(config: Mapping[str, Any], *names: str) -> None:
    """Raises `UserError` unless the named keys of `config.objective` are 1 or more."""
    for name in names:
        if config[name] < 1:
            raise UserError(f"config.objective.{name}={config[name]}: valid: 1 and more")


def check_negatives(config: Mapping[str, Any]) -> None:
    """Raises `UserError` if a batch of the stage's config has no pairs to tell an item's from."""
    if config["data"]["batch_size"] < 2:
        raise UserError(
            f"config.data.batch_size={config['data']['batch_size']} gives objective "
            f"'{config['objective']['name']}' no negatives, which are the other rows of the batch; "
            "valid: 2 and more"
        )


def check_temperature(config: Mapping[str, Any]) -> None:
    """Raises `UserError` unless `config.objective.temperature` is above 0, and finite."""
    if not 0 < config["temperature"] < math.inf:
        raise UserError(
            f"config.objective.temperature={config['temperature']}: valid: a finite number above 0"
        )
