"""Fine-tuning of weights that another run made, on your own labelled images.

    python -m bigmed.main --config configs/finetune.py --workdir DIR --config.data_root=FOLDER \\
        --config.stage.given.init_from.checkpoints=OTHER_WORKDIR/01_simclr/checkpoints

FOLDER/dataset is what tools/prepare_dataset.py made, with labels. The model must be the one that
was pretrained (`--config.model.depth`, `--config.augment.size`, ...). Each weight initialisation
gets the whole grid, chosen on validation, beside a linear probe. Behind a colon, the protocol of a
paper in place of the small grid of ours:

  simclr        SimCLR's transfer: 20,000 steps, 7 rates x 8 decays (arXiv 2002.05709, B.8)
  big_ssl_derm  Big-SSL's dermatology, 448 px in the paper; big_ssl_cxr its chest X-rays (arXiv
                2101.05224; steps, batch and grid are U)
  convirt       ConVIRT's: Adam, the head alone for 200 steps, early stopping (arXiv 2010.00747)
  bit_small     BiT-HyperRule below 20,000 images; bit_medium below 500,000; bit_large above
  cats          Cats, not CAT scans' (arXiv 2107.05940): Adam, 50 epochs, balanced classes

'bit_*' want images of 128 px where the originals are below 96 x 96, else of 480 px.

Hours: not measured on an accelerator yet; 'simclr' trains 56 times 20,000 steps.
Expected metric: depends on the images; above the linear probe, and 'given' above 'untrained'.
`:smoke` runs it on synthetic data.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` a protocol, or 'smoke' for synthetic data."""
    config = common.base(arg, *PROTOCOLS)
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.stages = ("untrained", "given")
    config.stage.untrained = common.stage(steps=0)
    config.stage.given = common.stage(steps=0, init_from=common.init_from(load=common.ENCODER))
    folder = "{data_root}/dataset"
    if arg == "smoke":
        config.stage.given.init_from = common.init_from()
        common.smoke(config)
        folder = "{workdir}/data/phantom"
    config.evaluate = ("linear", "finetune")
    settings = PROTOCOLS.get(arg, _ours if arg != "smoke" else _smoke)()
    config.evaluator = ConfigDict(
        {
            "linear": common.evaluator(folder, "linear"),
            "finetune": common.finetune(folder, **settings),
        }
    )
    return config


def _spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` numbers from 10^low to 10^high, evenly spaced by their logarithms."""
    return tuple(10 ** (low + i * (high - low) / (count - 1)) for i in range(count))


def _sgd(**overrides) -> ConfigDict:
    optim = common.optimizer("sgd", 0.0, lr_scaling="none", weight_decay=0.0, warmup_steps=0)
    optim.update(overrides)
    return optim


def _ours() -> dict:
    return {"epochs": 30.0, "patience": 10, "runs": 3}


def _smoke() -> dict:
    return {
        "steps": 6, "batch_size": 16, "learning_rates": (0.01, 0.1), "weight_decays": (0.0,),
        "head_only_steps": 2, "evaluate_every": 3, "runs": 2, "num_resamples": 100,
    }  # fmt: skip


def _simclr() -> dict:
    return {
        "steps": 20_000, "batch_size": 256, "learning_rates": _spaced(-4, -1, 7),
        "weight_decays": (0.0, *_spaced(-6, -3, 7)), "decay_over_rate": True,
    }  # fmt: skip


def _big_ssl(runs: int, select_by: str) -> dict:
    return {
        "steps": 30_000, "batch_size": 256, "learning_rates": _spaced(-3.5, -0.5, 7),
        "weight_decays": (0.0, 1e-5, 1e-4, 1e-3), "runs": runs, "select_by": select_by,
    }  # fmt: skip


def _convirt() -> dict:
    # Its 1e-6 of weight decay is a part of Adam's gradient, as torch.optim.Adam has it.
    adam = common.optimizer("adam", 0.0, lr_scaling="none", weight_decay=0.0, warmup_steps=0)
    adam.update(schedule="plateau", decay=0.5, patience=3)
    return {
        "epochs": 100.0, "batch_size": 64, "optim": adam, "learning_rates": (1e-4,),
        "weight_decays": (1e-6,), "head_only_steps": 200, "head_only_rate": 1e-3, "dropout": 0.2,
        "patience": 10, "runs": 5, "augment": {"recipe": "convirt", "normalize": "none"},
    }  # fmt: skip


def _bit(steps: int, warmup: int, mixup: float) -> dict:
    # arXiv 1912.11370, 3.3; rates are .003 at a batch of 512
    sgd = _sgd(schedule="steps", milestones=(0.3, 0.6, 0.9), warmup_steps=warmup, nesterov=False)
    return {
        "steps": steps, "batch_size": 512, "optim": sgd, "learning_rates": (0.003,),
        "weight_decays": (0.0,), "mixup": mixup,
    }  # fmt: skip


def _cats() -> dict:
    # its released code; the rates are those that it was tuned to by hand for each pair of data sets
    adam = common.optimizer("adam", 0.0, lr_scaling="none", weight_decay=0.0, warmup_steps=0)
    adam.schedule = "constant"
    return {
        "epochs": 50.0, "batch_size": 128, "optim": adam, "learning_rates": (1e-6, 1e-5, 1e-4),
        "weight_decays": (0.0,), "class_weights": "balanced", "dropout": 0.5,
        "augment": {
            "recipe": "none", "flip_prob": 0.5, "affine_degrees": 10.0, "affine_shift": 0.1,
        },
    }  # fmt: skip


PROTOCOLS = {
    "simclr": _simclr,
    "big_ssl_derm": lambda: _big_ssl(5, "accuracy")
    | {"augment": {"recipe": "derm", "rotation_degrees": 45.0}},
    "big_ssl_cxr": lambda: _big_ssl(10, "auc_macro") | {"augment": {"recipe": "cxr"}},
    "convirt": _convirt,
    "bit_small": lambda: _bit(500, 100, 0.0),
    "bit_medium": lambda: _bit(10_000, 500, 0.1),
    "bit_large": lambda: _bit(20_000, 500, 0.1),
    "cats": _cats,
}
