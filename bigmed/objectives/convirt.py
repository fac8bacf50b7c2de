"""ConVIRT (arXiv 2010.00747): an image and its report attract, the batch's other pairs repel.

A row of the batch is a study: one of its images, drawn anew at every visit, and a sentence of its
report, likewise (`config.data.text`). Options turn it into its successors: CLIP's loss (arXiv
2103.00020), SigLIP's (2303.15343), whole reports, equal texts that are no negatives, and terms
between two images or two texts of a study (CXR-CLIP).
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigmed import augment, losses
from bigmed.data import tokenise
from bigmed.errors import UserError, did_you_mean
from bigmed.models import bert, heads
from bigmed.models.catalogue import build
from bigmed.objectives import base

log = logging.getLogger("bigmed")

LOSSES = ("softmax", "sigmoid")
DUPLICATES = ("none", "mask", "multi")
MAX_SCALE = 100.0  # of the similarities, where it is learned (CLIP, section 2.5)


class Inputs(NamedTuple):
    """V views of each row's images, [B, V, S, S, C] float32, and its R texts, [B, R, T]."""

    views: jax.Array
    tokens: jax.Array
    token_mask: jax.Array


class Features(NamedTuple):
    """The encoders' outputs, float32: images [B, V, D], texts [B, R, W]."""

    images: jax.Array
    texts: jax.Array


class Objective(base.Objective):
    """Bidirectional contrast of images and texts, with an online probe on the image encoder.

    Config (`config.objective`): `loss`, 'softmax' (InfoNCE in both directions) or 'sigmoid';
    `temperature`, and whether to learn it (`learn_temperature`, as exp of `logit_scale`, from 1 to
    100); `logit_bias`, where the sigmoid's learned bias starts; `image_weight`, lambda, of the
    softmax's direction in which an image picks its text; `duplicates`, what pairs of rows with
    equal texts are: 'none' (negatives, as in the paper), 'mask' (left out) or 'multi' (positives);
    `image_image` and `text_text`, weights of the terms between two images (two views where
    `config.data.pairs` is None) and two texts (`config.data.text.texts=2`) of a row; `head_layers`,
    `head_dim`, `head_hidden` (0: the encoder's width). With several images or texts a row, the
    image-text term is the mean over their combinations.
    """

    IMAGES_PER_EXAMPLE = (1, 2)
    OF_TEXTS = ("text",)
    LEARNS_FROM = "reports"
    TRANSFER = ("params/backbone/.*", "batch_stats/backbone/.*", "params/text/.*")

    def __init__(self, config: Mapping[str, Any], data: base.DataSpec):
        super().__init__(config, data)
        self._check(config, data)
        section = dict(config["text_model"])
        section["vocab_size"] = section.get("vocab_size") or data.tokeniser.vocab_size
        self.text = build(section, self.dtype, "text_model")
        self.text.check()
        tokenise.check_fits(
            data.tokeniser,
            self.text.vocab_size,
            self.text.max_length,
            config["data"]["text"]["length"],
        )
        self.SHARDING = (*self.SHARDING, *bert.SHARDING)
        self.FROZEN = bert.frozen_patterns("text", self.text.train_after_layer)
        self.head = heads.ProjectionHead(  # section 2.1: g_v and g_u
            num_layers=self.config["head_layers"],
            hidden_dim=self.config["head_hidden"] or None,
            out_dim=self.config["head_dim"],
            norms="none",
            kernel_init=heads.lecun_init,
            dtype=self.dtype,
        )
        self.text_head = self.head.clone()

    def _check(self, config: Mapping[str, Any], data: base.DataSpec) -> None:
        own = self.config
        base.check_negatives(config)
        base.check_temperature(own)
        base.check_widths(own, "head_dim", "head_layers")
        if own["learn_temperature"] and not 1 / MAX_SCALE <= own["temperature"] <= 1:
            raise UserError(
                f"config.objective.temperature={own['temperature']} with learn_temperature: valid: "
                f"{1 / MAX_SCALE:g} to 1, the limits of what is learned"
            )
        for key, choices in (("loss", LOSSES), ("duplicates", DUPLICATES)):
            if own[key] not in choices:
                raise UserError(
                    f"config.objective.{key}='{own[key]}': {did_you_mean(own[key], choices)}"
                )
        for key, highest in (("image_weight", 1.0), ("image_image", 1e3), ("text_text", 1e3)):
            if not 0 <= own[key] <= highest:
                raise UserError(f"config.objective.{key}={own[key]}: valid: 0 to {highest:g}")
        if data.tokeniser is None:
            raise UserError(
                "objective 'convirt' needs texts; set config.data.text.tokeniser to a folder with "
                "a tokeniser of transformers or a vocab.txt"
            )
        started = any(config["init_from"][k] for k in ("text_weights", "stage", "checkpoints"))
        if data.total_steps and not started and config["text_model"]["train_after_layer"] >= 0:
            log.warning(
                "the text tower starts at random, its frozen layers stay so: give "
                "init_from.text_weights, or train all with config.text_model.train_after_layer=-1"
            )
        if own["text_text"]:
            _check_two_texts(config["data"]["text"])

    def init(self, key: jax.Array, batch_spec: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Fresh (params, batch_stats, extra) for batches of this form."""
        image_key, text_key = jax.random.split(key)
        modules = {
            "head": (self.head, self.width),
            "text_head": (self.text_head, self.text.feature_dim),
        }
        params, stats = self.init_modules(image_key, batch_spec, **modules)
        tokens = jnp.zeros((2, _texts_of(batch_spec)[0].shape[-1]), jnp.int32)
        mask = jnp.ones_like(tokens, bool)
        params["text"] = self.text.init(text_key, tokens, mask, train=False)["params"]
        if self.config["learn_temperature"]:
            params["logit_scale"] = jnp.asarray(-math.log(self.config["temperature"]), jnp.float32)
        if self.config["loss"] == "sigmoid":
            params["logit_bias"] = jnp.asarray(self.config["logit_bias"], jnp.float32)
        return params, stats, {}

    def prepare(self, batch: Mapping[str, jax.Array], key: jax.Array, train: bool) -> Inputs:
        """One view of each image of a row; in evaluation without augmentation.

        With one image a row and a term between images there are two views of it.
        """
        texts, count = _texts_of(batch), batch["image"].shape[1]
        which = list(range(count))
        if count == 1 and self.config["image_image"]:
            which = [0, 0]
        views = []
        for view, i in enumerate(which):
            images, boxes = batch["image"][:, i], batch["box"][:, i]
            if train:
                view_key = jax.random.fold_in(key, view)
                views.append(augment.augment(self.augmentation, view_key, images, boxes))
            else:
                views.append(augment.eval_transform(self.augmentation, images, boxes))
        return Inputs(jnp.stack(views, axis=1), *texts)

    def embed(
        self, params: Any, batch_stats: Any, extra: Any, inputs: Inputs, key: jax.Array,
        train: bool,
    ) -> tuple[Features, Any]:  # fmt: skip
        """The two encoders' features of any rows."""
        del extra
        b, v, *shape = inputs.views.shape
        views = inputs.views.reshape(b * v, *shape)
        images, stats = base.apply("backbone", self.backbone, params, batch_stats, views, train)
        texts = self._encode_texts(params, inputs.tokens, inputs.token_mask, key, train)
        return Features(images.reshape(b, v, -1), texts), stats

    def compare(
        self, params: Any, batch_stats: Any, extra: Any, outputs: Features,
        batch: Mapping[str, jax.Array], key: jax.Array, train: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:  # fmt: skip
        """The contrast of the projections, plus the probe's loss, which reaches only itself."""
        del extra, key
        images = _project("head", self.head, params, outputs.images, train)  # BVP
        texts = _project("text_head", self.text_head, params, outputs.texts, train)  # BRP
        scale = self.scale(params)

        def contrast(v: jax.Array, u: jax.Array, weight: float, ids: Any) -> Any:
            duplicates = self.config["duplicates"] if ids is not None else "none"
            settings = {"scale": scale, "ids": ids, "duplicates": duplicates}
            if self.config["loss"] == "sigmoid":
                return losses.sigmoid(v, u, bias=params["logit_bias"], **settings)
            return losses.infonce(v, u, weight=weight, **settings)

        pairs = [
            contrast(
                images[:, v], texts[:, r], self.config["image_weight"], batch["text_id"][:, r]
            )
            for v in range(images.shape[1])
            for r in range(texts.shape[1])
        ]
        total = sum(pair.loss for pair in pairs) / len(pairs)
        metrics = {
            "image_text_loss": total,
            "contrast_accuracy": pairs[0].accuracy,
            "contrast_entropy": pairs[0].entropy,
            "similarity_scale": jnp.asarray(scale, jnp.float32),
            "duplicate_texts": _share_of_duplicates(batch["text_id"][:, 0]),
            **losses.embedding_health(images[:, 0]),
        }
        if self.config["image_image"]:
            term = contrast(images[:, 0], images[:, 1], 0.5, None).loss
            metrics["image_image_loss"] = term
            total = total + self.config["image_image"] * term
        if self.config["text_text"]:
            both = (batch["text_id"][:, 0], batch["text_id"][:, 1])
            term = contrast(texts[:, 0], texts[:, 1], 0.5, both).loss
            metrics["text_text_loss"] = term
            total = total + self.config["text_text"] * term
        probe_loss, probe_metrics = self.probe_loss(params, outputs.images, batch["labels"])
        aux = {
            "batch_stats": batch_stats,
            "metrics": {**metrics, **probe_metrics},
            "carry": {},
            "activations": {"3_images": images, "4_texts": texts},
        }
        return total + probe_loss, aux

    def predict_fns(self) -> dict[str, Callable[[Any, Mapping[str, jax.Array]], jax.Array]]:
        """'encoder', and the unit vectors that are compared: 'image' and, of a text, 'text'."""

        def image(state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            features = self.features(state, batch)[:, None]
            projected = _project("head", self.head, state.params, features, False)
            return losses.l2_normalize(projected[:, 0])

        def text(state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            first = (x[:, :1] for x in _texts_of(batch))
            features = self._encode_texts(state.params, *first, jax.random.key(0), False)
            projected = _project("text_head", self.text_head, state.params, features, False)
            return losses.l2_normalize(projected[:, 0])

        return {**super().predict_fns(), "image": image, "text": text}

    def _encode_texts(
        self, params: Any, tokens: jax.Array, mask: jax.Array, key: jax.Array, train: bool
    ) -> jax.Array:
        """[B, R, T] -> [B, R, W] float32."""
        b, r, t = tokens.shape
        features, _ = self.text.apply(
            {"params": params["text"]},
            tokens.reshape(b * r, t),
            mask.reshape(b * r, t),
            train=train,
            rngs={"dropout": key},
        )
        return features.reshape(b, r, -1)

    def scale(self, params: Any) -> jax.Array | float:
        """1 / temperature."""
        if not self.config["learn_temperature"]:
            return 1.0 / self.config["temperature"]
        return jnp.exp(_limited(params["logit_scale"]))


def _check_two_texts(text: Mapping[str, Any]) -> None:
    """Raises `UserError` unless a row may hold two texts that differ."""
    if text["texts"] < 2:
        raise UserError(
            "config.objective.text_text compares two texts of a row; set config.data.text.texts=2"
        )
    one_section = text["unit"] == "section" and text["sections"] in ("impression", "either")
    if text["sentences"] == 0 or text["unit"] == "report" or one_section:
        names = ("sections", "unit", "sentences")
        given = ", ".join(f"{name}={text[name]!r}" for name in names)
        raise UserError(
            f"config.objective.text_text would compare a text with itself: config.data.text "
            f"({given}) makes one text of a report; valid: unit='sentence' and sentences=1 or more"
        )


@jax.custom_vjp
def _limited(log_scale: jax.Array) -> jax.Array:
    """Clipped to [0, ln 100], with a gradient that is 0 only where it leads further out.

    A plain clip's is 0 everywhere outside: a scale that one step took past a limit would stay.
    """
    return jnp.clip(log_scale, 0.0, math.log(MAX_SCALE))


def _limited_backward(log_scale: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    too_low = (log_scale <= 0.0) & (gradient > 0)
    too_high = (log_scale >= math.log(MAX_SCALE)) & (gradient < 0)
    return (jnp.where(too_low | too_high, 0.0, gradient),)


_limited.defvjp(lambda log_scale: (_limited(log_scale), log_scale), _limited_backward)


def _texts_of(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Tokens and mask [B, R, T] of a batch, or of its form; `UserError` without."""
    if "tokens" not in batch or "token_mask" not in batch:
        raise UserError(
            f"the text tower needs batches with tokens and token_mask, not of {', '.join(batch)}; "
            "valid: training data with config.data.text, evaluators of 'encoder' or 'image'"
        )
    return batch["tokens"], batch["token_mask"]


def _project(name: str, head: Any, params: Any, features: jax.Array, train: bool) -> jax.Array:
    """[B, K, D] -> [B, K, P] float32."""
    b, k, d = features.shape
    projected, _ = head.apply({"params": params[name]}, features.reshape(b * k, d), train=train)
    return projected.reshape(b, k, -1)


def _share_of_duplicates(ids: jax.Array) -> jax.Array:
    """The share of rows whose text another row has too."""
    ordered = jnp.sort(ids)
    equal = ordered[1:] == ordered[:-1]
    repeated = jnp.pad(equal, (0, 1)) | jnp.pad(equal, (1, 0))
    return jnp.mean(repeated.astype(jnp.float32))
