"""Optimisers, schedules, weight-decay roles and freezing, from `config.optim`.

The only module that names optimisers. Every parameter is covered by exactly one thing: a `freeze`
pattern, or one of the `rules`, which give it a role:

  'adapted'  weight decay and, with LARS and LAMB, the trust ratio (kernels)
  'plain'    neither (biases, normalisation, embeddings of position; the online probe)
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import optax

from bigmed import tree
from bigmed.errors import UserError, did_you_mean

ROLES = ("adapted", "plain")
# SimCLR keeps weight decay and adaptation away from biases, normalisation and the supervised head.
DEFAULT_RULES = (
    (r"(?!probe/).*/kernel", "adapted"),
    (r"(?!probe/).*/(bias|scale|cls|distillation|registers|pos_embedding|gamma)", "plain"),
    (r"probe/.*", "plain"),
)
LR_SCALING = {
    "none": lambda lr, batch_size: lr,
    "linear": lambda lr, batch_size: lr * batch_size / 256,
    "sqrt": lambda lr, batch_size: lr * math.sqrt(batch_size),
}


def make_schedule(
    config: Mapping[str, Any], *, batch_size: int, total_steps: int
) -> Callable[[Any], Any]:
    """Learning rate by step: linear warm-up from 0, then a cosine to 0 or a constant.

    Args:
      config: `lr`, `lr_scaling` ('none'; 'linear' = lr*B/256; 'sqrt' = lr*sqrt(B); SimCLR section
        2.3 and B.1), `warmup_steps`, `schedule` ('cosine' or 'constant').
      batch_size: B, source items a step over all devices.
      total_steps: of the stage, warm-up included.

    Raises:
      UserError: an unknown name, or a warm-up longer than the stage.
    """
    scaling, shape = config["lr_scaling"], config["schedule"]
    if scaling not in LR_SCALING:
        raise UserError(f"config.optim.lr_scaling='{scaling}': {did_you_mean(scaling, LR_SCALING)}")
    peak = LR_SCALING[scaling](float(config["lr"]), batch_size)
    warmup = int(config["warmup_steps"])
    if warmup < 0 or (total_steps and warmup > total_steps):
        raise UserError(
            f"config.optim.warmup_steps={warmup} does not fit {total_steps} steps; "
            f"use 0 to {total_steps}"
        )
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1)),
        "constant": optax.constant_schedule(peak),
    }
    if shape not in after:
        raise UserError(f"config.optim.schedule='{shape}': {did_you_mean(shape, after)}")
    if not warmup:
        return after[shape]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after[shape]], [warmup])


def roles(config: Mapping[str, Any], params: Any) -> Any:
    """The role of every parameter: 'adapted', 'plain' or 'frozen', as a tree like `params`.

    Raises:
      UserError: a parameter matches no rule or several, a role is unknown, or a `freeze` pattern
        matches nothing.
    """
    freeze = tuple(config.get("freeze", ()))
    rules = tuple(config.get("rules", ())) or DEFAULT_RULES
    names = list(tree.flatten(params))
    for pattern in freeze:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"config.optim.freeze pattern '{pattern}' matches no parameter")
    for _, role in rules:
        if role not in ROLES:
            raise UserError(f"config.optim.rules role '{role}': {did_you_mean(role, ROLES)}")

    def role_of(name: str, _: Any) -> str:
        if tree.matches(freeze, name):
            return "frozen"
        found = [(pattern, role) for pattern, role in rules if re.fullmatch(pattern, name)]
        if len(found) != 1:
            hits = " and ".join(f"'{pattern}'" for pattern, _ in found) or "no rule"
            raise UserError(
                f"config.optim.rules: parameter '{name}' matches {hits}; it must match exactly one"
            )
        return found[0][1]

    return tree.map_with_name(role_of, params)


def make_optimizer(
    config: Mapping[str, Any], params: Any, *, batch_size: int, total_steps: int
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """The optimiser that `config.optim` describes.

    Args:
      config: `name` ('lars', 'sgd', 'adamw' or 'lamb'), `lr` and the rest of `make_schedule`,
        `weight_decay`, `momentum` (lars, sgd), `b1`, `b2` (adamw, lamb), `grad_clip_norm` (0: off),
        `rules` and `freeze` (see the module's docstring).
      params: parameters or their shapes.

    Returns:
      The transformation, whose update needs the parameters, and the learning-rate schedule.

    Raises:
      UserError: see `make_schedule` and `roles`; an unknown optimiser.
    """
    schedule = make_schedule(config, batch_size=batch_size, total_steps=total_steps)
    role_tree = roles(config, params)
    role_by_name = tree.flatten(role_tree)

    def adapted(subtree: Any) -> Any:  # frozen leaves are masked out of what optax passes
        return tree.map_with_name(lambda name, _: role_by_name[name] == "adapted", subtree)

    decay, momentum = float(config["weight_decay"]), float(config["momentum"])
    betas = {"b1": float(config["b1"]), "b2": float(config["b2"])}
    makers = {
        # eeta 0.001, classic momentum with the learning rate inside the buffer: the released
        # SimCLR code's LARS, step for step (tests/test_optim.py).
        "lars": lambda: optax.lars(
            schedule, decay, adapted, 1e-3, trust_ratio_mask=adapted, momentum=momentum
        ),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay, adapted),
            optax.sgd(schedule, momentum=momentum or None, nesterov=bool(momentum)),
        ),
        "adamw": lambda: optax.adamw(schedule, **betas, weight_decay=decay, mask=adapted),
        "lamb": lambda: lamb(schedule, adapted, decay, **betas),
    }
    if config["name"] not in makers:
        raise UserError(
            f"config.optim.name='{config['name']}': {did_you_mean(config['name'], makers)}"
        )
    clip = float(config["grad_clip_norm"])
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    groups = {
        "trained": optax.chain(*steps, makers[config["name"]]()),
        "frozen": optax.set_to_zero(),  # and no optimiser state
    }
    group_of = {"adapted": "trained", "plain": "trained", "frozen": "frozen"}
    labels = tree.map_with_name(lambda _, role: group_of[role], role_tree)
    return optax.partition(groups, labels), schedule


def updates_done(opt_state: Any) -> Any:
    """The count that the schedule goes by: updates made, without the batches that were left out."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def lamb(schedule: Any, adapted: Any, decay: float, *, b1: float, b2: float) -> Any:
    """LAMB (arXiv 1904.00962) with decay and trust ratio on the adapted parameters alone."""
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=1e-6),
        optax.add_decayed_weights(decay, adapted),
        optax.masked(optax.scale_by_trust_ratio(), adapted),
        optax.scale_by_learning_rate(schedule),
    )
