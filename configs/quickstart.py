"""SimCLR, then MICLe, on the embedded synthetic radiographs; the first thing to run.

    python -m bigmed.main --config configs/quickstart.py --workdir /tmp/bigmed

Hours: 0.1 on 2 CPU cores. Expected metric: linear-probe macro AUC of 0.61 untrained, 0.72 after
SimCLR, 0.78 after MICLe (docs/results.md). The data are synthetic: the numbers show
that the machinery works, and nothing about medicine.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps."""
    config = common.base(arg)
    common.use_phantom(config, num_patients=800, size=64)
    config.model = common.resnet(18)
    config.augment = common.augmentation("cxr", 48)
    config.data.batch_size = 64
    config.objective.temperature = 0.2  # U
    config.optim = common.lars(lr=0.3, warmup_steps=10)
    config.checkpoint.every = 50
    config.stages = ("untrained", "simclr", "micle")
    config.stage.untrained = common.stage(steps=0)
    config.stage.simclr = common.stage(steps=120)
    config.stage.micle = common.stage(
        steps=60,
        init_from=common.init_from(stage="simclr"),
        objective=common.simclr_objective("micle", temperature=0.2),
        data={"pairs": "case"},
    )
    return common.smoke(config) if arg == "smoke" else config
