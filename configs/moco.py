"""MoCo: momentum contrast with a queue (v1, arXiv 1911.05722; v2, arXiv 2003.04297).

    python -m bigmed.main --config configs/moco.py:v2 --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is what tools/prepare_dataset.py made. 'v1' has a linear head, temperature .07 and
steps; 'v2' (the default) a hidden layer, temperature .2, a blur and a cosine. Both: ResNet-50,
batch 256, 200 epochs, a queue of 65,536, which wants data sets that are larger than it. Hours: not
measured on an accelerator yet. Expected metric: depends on the images; docs/results.md has small
real ones. `:smoke` runs it on synthetic data in about a minute.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'v1', 'v2', or 'smoke' for a few steps."""
    config = common.base(arg, "v1", "v2")
    config.data.channels = 3  # grey images are repeated
    config.data.batch_size = 256
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.model = common.resnet(50)
    # v1 has c2l's jitter, without rotation and holes
    v1 = common.augmentation("c2l", 224)
    v1.update(affine_degrees=0.0, cutout_prob=0.0)
    config.augment = v1 if arg == "v1" else common.augmentation("moco_v2", 224)
    if arg == "v1":
        config.objective = common.moco_objective(bn_groups=8)
        config.optim = common.momentum_sgd(0.03, milestones=(0.6, 0.8))
    else:
        config.objective = common.moco_objective(bn_groups=8, head="mlp", temperature=0.2)
        config.optim = common.momentum_sgd(0.03)
    config.stages = ("untrained", "moco")
    config.stage.untrained = common.stage(steps=0)
    config.stage.moco = common.stage(epochs=200.0)
    common.set_evaluators(config, "{data_root}/dataset")
    if arg == "smoke":
        config = common.smoke(config)
        config.objective.queue_size = 64
    return config
