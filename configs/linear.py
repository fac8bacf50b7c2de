"""Linear probe and k-NN of weights that another run made, on your own labelled images.

    python -m bigmed.main --config configs/linear.py --workdir DIR --config.data_root=FOLDER \\
        --config.stage.given.init_from.checkpoints=OTHER_WORKDIR/01_simclr/checkpoints

FOLDER/dataset is what tools/prepare_dataset.py made, with labels. The model must be the one that
was pretrained (`--config.model.depth`, `--config.augment.size`, ...). Nothing is trained but the
probe. Hours: 0.1, on any hardware. Expected metric: the stage 'given' above the stage 'untrained'.
`:smoke` evaluates an untrained network on synthetic data.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for synthetic data and no given weights."""
    config = common.base(arg)
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.stages = ("untrained", "given")
    config.stage.untrained = common.stage(steps=0)
    # The head is left fresh: features come from the encoder, whatever head it was trained with.
    config.stage.given = common.stage(steps=0, init_from=common.init_from(load=common.ENCODER))
    common.set_evaluators(config, "{data_root}/dataset")
    if arg == "smoke":
        config.stage.given.init_from = common.init_from()
        return common.smoke(config)
    return config
