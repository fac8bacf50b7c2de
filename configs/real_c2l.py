"""Real chest X-rays on two CPU cores: C2L against its first loss alone (MoCo) and untrained.

    python -m bigmed.main --config configs/real_c2l.py --workdir DIR --config.data_root=DATA

DATA/cxr_nih, cxr_covid, cxr_kermany and cxr_actualmed are prepared as docs/results.md says. A step
of C2L passes two batches through the student and two through the teacher, MoCo's one each, so MoCo
gets twice the steps. Three seeds. Hours: 0.5 on 2 CPU cores. Expected metric: see docs/results.md.
Network, image size, queue and number of steps are what two cores finish, far below the paper's;
values marked U are ours.
"""

from configs import common

SOURCES = ("cxr_nih", "cxr_covid", "cxr_kermany", "cxr_actualmed")


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg)
    config.seeds = (0, 1, 2)
    config.model = common.resnet(18)
    config.data.canvas = 128
    config.data.batch_size = 32
    common.set_data(config, **{s: common.source("{data_root}/" + s, "train") for s in SOURCES})
    config.augment = common.augmentation("c2l", 64)
    # U: all but the losses; a queue of half the images and a quicker teacher for a short run
    config.objective = common.c2l_objective(
        mode="infonce", queue="snapshot", queue_size=512, temperature=0.2, momentum=0.99
    )
    config.optim = common.momentum_sgd(0.03)
    config.checkpoint.every = 100
    config.stages = ("untrained", "moco", "c2l")
    config.stage.untrained = common.stage(steps=0)
    config.stage.moco = common.stage(steps=400, objective={"losses": ("plain",)})
    config.stage.c2l = common.stage(steps=200)
    common.set_evaluators(config, "{data_root}/cxr_nih", classes=common.CXR_FINDINGS)
    if arg == "smoke":
        config = common.smoke(config)
        config.objective.queue_size = 64
    return config
