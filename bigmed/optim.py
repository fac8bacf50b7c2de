"""Optimisers, schedules, weight-decay roles and freezing, from `config.optim`.

The only module that names optimisers. Every parameter is covered by exactly one thing: a `freeze`
pattern, or one of the `rules`, which give it a role:

  'adapted'  weight decay and, with LARS and LAMB, the trust ratio (kernels)
  'plain'    neither (biases, normalisation, embeddings of position; the online probe)
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigmed import tree
from bigmed.errors import UserError, did_you_mean

ROLES = ("adapted", "plain")
# SimCLR keeps weight decay and adaptation away from biases, normalisation and the supervised head.
DEFAULT_RULES = (
    (r"(?!probe/).*/kernel", "adapted"),
    (r"(?!probe/).*/(bias|scale|cls|distillation|registers|pos_embedding|gamma)", "plain"),
    (r"probe/.*", "plain"),
    (r"logit_(scale|bias)", "plain"),  # learned temperature and bias of a contrastive loss
)
# names of an encoder's layers, see `layer_scales`
_LAYER = re.compile(r"backbone/(stage|block|transition)(\d+)(?:/(?:block|layer)(\d+))?/")
_FIRST = re.compile(r"backbone/(stem|patches|cls|distillation|registers|pos_embedding)")
LR_SCALING = {
    "none": lambda lr, batch_size: lr,
    "linear": lambda lr, batch_size: lr * batch_size / 256,
    "sqrt": lambda lr, batch_size: lr * math.sqrt(batch_size),
}


def make_schedule(
    config: Mapping[str, Any], *, batch_size: int, total_steps: int
) -> Callable[[Any], Any]:
    """Learning rate by step: linear warm-up from 0, then one of four shapes.

    Args:
      config: `lr`, `lr_scaling` ('none'; 'linear' = lr*B/256; 'sqrt' = lr*sqrt(B); SimCLR section
        2.3 and B.1), `warmup_steps`, `schedule`: 'cosine' to 0; 'constant'; 'steps', times `decay`
        after each of the `milestones`, fractions of the stage; 'plateau', times `decay` after every
        `patience` validations in a row that brought no lower loss (`observe`).
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
    milestones, decay = tuple(config["milestones"]), float(config["decay"])
    if not 0 < decay <= 1 or not all(0 < m < 1 for m in milestones) or config["patience"] < 1:
        raise UserError(
            f"config.optim: milestones={milestones} are fractions of the stage, decay={decay} is "
            f"above 0 and at most 1, patience={config['patience']} is 1 or more"
        )
    falls: dict[int, float] = {}
    for milestone in milestones:  # of a short stage two may meet
        step = round(milestone * total_steps) - warmup
        falls[step] = falls.get(step, 1.0) * decay
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1)),
        "constant": optax.constant_schedule(peak),
        "steps": optax.piecewise_constant_schedule(peak, falls),
        "plateau": optax.constant_schedule(peak),
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
      config: `name` ('lars', 'sgd', 'adam', 'adamw' or 'lamb'), `lr` and the rest of
        `make_schedule`, `weight_decay` (of 'adam' as a part of the gradient, as torch.optim.Adam
        has it), `momentum` (lars, sgd), `nesterov` (sgd), `b1`, `b2` (adam, adamw, lamb),
        `grad_clip_norm` (0: off), `layer_decay` (1: off; see `layer_scales`), `rules` and `freeze`
        (see the module's docstring).
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
            optax.sgd(
                schedule, momentum=momentum or None, nesterov=bool(config["nesterov"] and momentum)
            ),
        ),
        "adam": lambda: optax.chain(
            optax.add_decayed_weights(decay, adapted), optax.adam(schedule, **betas)
        ),
        "adamw": lambda: optax.adamw(schedule, **betas, weight_decay=decay, mask=adapted),
        "lamb": lambda: lamb(schedule, adapted, decay, **betas),
    }
    if config["name"] not in makers:
        raise UserError(
            f"config.optim.name='{config['name']}': {did_you_mean(config['name'], makers)}"
        )
    clip = float(config["grad_clip_norm"])
    steps = [*([optax.clip_by_global_norm(clip)] if clip else []), makers[config["name"]]()]
    if config["schedule"] == "plateau":
        steps.append(scale_by_plateau())
    layer_decay = float(config["layer_decay"])
    if not 0 < layer_decay <= 1:
        raise UserError(f"config.optim.layer_decay={layer_decay}: valid: above 0, at most 1")
    if layer_decay < 1:
        scales = layer_scales(list(role_by_name), layer_decay)
        steps.append(optax.stateless(lambda updates, _: _scaled(updates, scales)))
    groups = {
        "trained": optax.chain(*steps),
        "frozen": optax.set_to_zero(),  # and no optimiser state
    }
    group_of = {"adapted": "trained", "plain": "trained", "frozen": "frozen"}
    labels = tree.map_with_name(lambda _, role: group_of[role], role_tree)
    return optax.partition(groups, labels), schedule


def layer_scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied with under layer-wise decay.

    The heads have 1, the encoder's last layer `decay`, the one before `decay`^2, and so on down to
    the stem (ELECTRA, arXiv 2003.10555, section 3; BEiT, arXiv 2106.08254, appendix). A layer is a
    block of a transformer or ResNet, a layer or transition of a DenseNet; what comes before the
    first belongs to one of its own, what comes after the last to the last.

    Args:
      names: of the parameters; the encoder's begin with 'backbone/'.
      decay: of one layer.
    """

    def place(name: str) -> tuple[float, float]:
        found = _LAYER.match(name)
        if found is None:
            return (0, 0) if _FIRST.match(name) else (math.inf, 0)
        kind, number, inner = found.groups()
        return int(number), math.inf if kind == "transition" else int(inner or 0)

    places = {name: place(name) for name in names if name.startswith("backbone/")}
    layers = sorted({p for p in places.values() if p[0] != math.inf})
    depth = {p: len(layers) - i for i, p in enumerate(layers)}
    return {
        name: decay ** depth.get(places[name], 1) if name in places else 1.0 for name in names
    }


def _scaled(updates: Any, scales: Mapping[str, float]) -> Any:
    return tree.map_with_name(lambda name, u: u * scales[name], updates)


def learning_rate(schedule: Callable[[Any], Any], opt_state: Any) -> jax.Array:
    """The rate of the next update, float32; batches that were left out do not count as updates."""
    rate = schedule(optax.tree.get_all_with_path(opt_state, "count")[0][1])
    for plateau in _plateaus(opt_state):
        rate = rate * plateau.scale
    return jnp.asarray(rate, jnp.float32)


class Plateau(NamedTuple):
    """State of the 'plateau' schedule; scalars.

    Attributes:
      scale: of the learning rate, float32.
      best: the lowest validation loss, float32.
      waited: validations since then or since the last fall of the rate, int32.
    """

    scale: jax.Array
    best: jax.Array
    waited: jax.Array


def scale_by_plateau() -> optax.GradientTransformation:
    """Scales updates by what `observe` has made of the state."""

    def init(params: Any) -> Plateau:
        del params
        return Plateau(jnp.ones(()), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Plateau, params: Any = None) -> tuple[Any, Plateau]:
        del params
        return jax.tree.map(lambda u: u * state.scale, updates), state

    return optax.GradientTransformation(init, update)


def observe(config: Mapping[str, Any], opt_state: Any, loss: jax.Array) -> Any:
    """The optimiser's state after a validation; the same unless the schedule is 'plateau'."""

    def after(state: Any) -> Any:
        if not isinstance(state, Plateau):
            return state
        better = loss < state.best  # False for NaN
        waited = jnp.where(better, 0, state.waited + 1)
        falls = waited >= config["patience"]
        return Plateau(
            scale=jnp.where(falls, state.scale * config["decay"], state.scale),
            best=jnp.where(better, loss, state.best),
            waited=jnp.where(falls, 0, waited),
        )

    return jax.tree.map(after, opt_state, is_leaf=lambda x: isinstance(x, Plateau))


def _plateaus(opt_state: Any) -> list[Plateau]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Plateau))
    return [leaf for leaf in leaves if isinstance(leaf, Plateau)]


def lamb(schedule: Any, adapted: Any, decay: float, *, b1: float, b2: float) -> Any:
    """LAMB (arXiv 1904.00962) with decay and trust ratio on the adapted parameters alone."""
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=1e-6),
        optax.add_decayed_weights(decay, adapted),
        optax.masked(optax.scale_by_trust_ratio(), adapted),
        optax.scale_by_learning_rate(schedule),
    )
