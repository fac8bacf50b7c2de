"""What is evaluated of a stage: every evaluator, in a few-label sweep at each fraction and draw."""

import dataclasses
import hashlib

from ml_collections import ConfigDict

from bigmed.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Cell:
    """One evaluation of a stage.

    Attributes:
      name: what it is recorded under: 'linear', or in a sweep 'linear@0.1/3'.
      evaluator: its name in `config.evaluate`.
      settings: its section of the config; in a sweep, with the cell's fraction and seed.
      subset: (fraction, seed) in a sweep, else None.
    """

    name: str
    evaluator: str
    settings: ConfigDict
    subset: tuple[float, int] | None

    def protocol(self) -> str:
        """Tells the settings from others, whatever the fraction and its seed."""
        settings = {k: v for k, v in self.settings.items() if k not in ("fraction", "seed")}
        return _hash(ConfigDict(settings))

    def digest(self) -> str:
        """Tells these settings from others."""
        return _hash(self.settings)


def _hash(settings: ConfigDict) -> str:
    return hashlib.sha256(settings.to_json_best_effort().encode()).hexdigest()[:16]


def cells(config: ConfigDict) -> list[Cell]:
    """The evaluations of each stage, in order.

    `config.sweep.fractions` are shares of the training patients whose labels may be used, and
    `config.sweep.seeds` draw them; these are no training seeds. At fraction 1 there is nothing to
    draw, and one cell. Without fractions, each evaluator runs once, as its section says.

    Raises:
      UserError: an evaluator that is not there or that takes no fraction, a fraction outside
        (0, 1], a seed that is no whole number from 0.
    """
    for name in config.evaluate:
        if name not in config.evaluator:
            raise UserError(
                f"config.evaluate names '{name}': {did_you_mean(name, config.evaluator)}"
            )
    subsets = _subsets(config.sweep)
    if not subsets:
        return [Cell(name, name, config.evaluator[name], None) for name in config.evaluate]
    made = []
    for name in config.evaluate:
        missing = {"fraction", "seed"} - set(config.evaluator[name])
        if missing:
            raise UserError(
                f"config.sweep: config.evaluator.{name} has no {' and no '.join(sorted(missing))}; "
                "a sweep takes evaluators that have both"
            )
        for fraction, seed in subsets:
            settings = ConfigDict({**config.evaluator[name], "fraction": fraction, "seed": seed})
            draw = f"/{seed}" if fraction < 1 else ""
            made.append(Cell(f"{name}@{fraction}{draw}", name, settings, (fraction, seed)))
    return made


def _subsets(sweep: ConfigDict) -> list[tuple[float, int]]:
    """(fraction, seed) of every draw, the smallest fraction first."""
    for fraction in sweep.fractions:
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise UserError(
                f"config.sweep.fractions has {fraction!r}; valid: numbers above 0, at most 1"
            )
    for seed in sweep.seeds:
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"config.sweep.seeds has {seed!r}; valid: whole numbers from 0")
    if sweep.fractions and not sweep.seeds:
        raise UserError("config.sweep.seeds is empty; give at least one")
    seeds = list(dict.fromkeys(sweep.seeds))
    return [
        (fraction, seed)
        for fraction in sorted({float(f) for f in sweep.fractions})
        for seed in (seeds if fraction < 1 else seeds[:1])
    ]
