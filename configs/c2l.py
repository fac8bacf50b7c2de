"""C2L: momentum contrast of radiographs with mixup of images and features (arXiv 2007.07423).

    python -m bigmed.main --config configs/c2l.py --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is what tools/prepare_dataset.py made. Without an argument, or with '120', it trains
as the released code and its README do: ResNet-18 from random weights, batch 128, 120 epochs, the
rate divided by ten after half, two thirds and five sixths; '240' doubles the epochs, as the name of
the released checkpoint suggests (U). 'recommended' scores all losses against one queue by InfoNCE
and pushes once a step. Hours: not measured on an accelerator yet. Expected metric: depends on the
images; docs/results.md compares it with MoCo on small real sets. `:smoke` runs it on synthetic data
in about a minute.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` '120', '240', 'recommended', or 'smoke' for a few steps."""
    config = common.base(arg, "120", "240", "recommended")
    config.data.channels = 3  # grey images are repeated
    config.data.batch_size = 128
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.model = common.resnet(18)
    config.augment = common.augmentation("c2l", 224)
    config.objective = common.c2l_objective(bn_groups=4)  # the released run had 4 devices
    if arg == "recommended":
        config.objective.update(mode="infonce", queue="snapshot", bn_groups=1)
    config.optim = common.momentum_sgd(0.03, milestones=(1 / 2, 2 / 3, 5 / 6))
    config.stages = ("untrained", "c2l")
    config.stage.untrained = common.stage(steps=0)
    config.stage.c2l = common.stage(epochs=240.0 if arg == "240" else 120.0)
    common.set_evaluators(config, "{data_root}/dataset")
    if arg == "smoke":
        config = common.smoke(config)
        config.objective.queue_size = 64
    return config
