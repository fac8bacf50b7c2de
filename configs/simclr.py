"""SimCLR on your own images; give the folder that tools/prepare_dataset.py made.

    python -m bigmed.main --config configs/simclr.py --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is the prepared data set. ResNet-50 at 224 px, 100 epochs, batch 512, one stage after
an untrained baseline. Hours: not measured on an accelerator yet; on 2 CPU cores use
configs/real_cxr.py's sizes. Expected metric: depends on the images; the linear probe's macro AUC
must be above the untrained stage's. `:smoke` runs it on synthetic data in a minute.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg)
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    # SimCLR v1 (arXiv 2002.05709, 2.3, B.1): LARS, 0.3*B/256, weight decay 1e-6, tau 0.1.
    config.optim = common.lars(lr=0.3, warmup_steps=100)
    config.stages = ("untrained", "simclr")
    config.stage.untrained = common.stage(steps=0)
    config.stage.simclr = common.stage(epochs=100.0)
    common.set_evaluators(config, "{data_root}/dataset")
    return common.smoke(config) if arg == "smoke" else config
