"""MoCo v3: BYOL's student and teacher with InfoNCE, for transformers (arXiv 2104.02057).

    python -m bigmed.main --config configs/moco_v3.py --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is what tools/prepare_dataset.py made. Without an argument: ViT-S/16 with fixed
positions and a patch projection that is never trained (section 4), AdamW with lr 1.5e-4 * batch /
256 and weight decay .1, temperature .2. 'resnet50': LARS with lr .3 * batch / 256, temperature 1.
The teacher's momentum rises from .99 to 1. U: the number of steps, and a batch of 1024 (the paper's
is 4096); the code's ViT-S has 12 attention heads, this one 6. Hours: not measured on an accelerator
yet. Expected metric: depends on the images. `:smoke` runs it on synthetic data in about a minute.
"""

from configs import common

STEPS = 100_000  # U
WARMUP = STEPS * 40 // 300  # 40 of 300 epochs


def get_config(arg: str = ""):
    """The config; `arg` 'resnet50', or 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg, "resnet50")
    config.data.batch_size = 1024
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.augment = common.augmentation("byol", 224)
    settings = {"second_view": common.BYOL_SECOND_VIEW}
    if arg == "resnet50":
        config.model = common.resnet(50)
        config.augment.crop_area_min = 0.2
        config.objective = common.moco_v3_objective(
            temperature=1.0, head_layers=2, predictor_norm=False, **settings
        )
        config.optim = common.lars(lr=0.3, warmup_steps=STEPS // 30)  # 10 of 300 epochs
    else:
        config.model = common.vit("S/16", position="sincos2d")
        config.objective = common.moco_v3_objective(**settings)
        config.optim = common.optimizer(
            "adamw", 1.5e-4, lr_scaling="linear", weight_decay=0.1, warmup_steps=WARMUP
        )
        config.optim.freeze = ("backbone/patches/.*",)
    config.stages = ("untrained", "moco_v3")
    config.stage.untrained = common.stage(steps=0)
    config.stage.moco_v3 = common.stage(steps=STEPS)
    common.set_evaluators(config, "{data_root}/dataset")
    if arg == "smoke":
        config = common.smoke(config)
        config.objective.update(head_hidden=32, head_dim=16)
    return config
