"""BYOL: a student predicts a slow teacher's view of the same image (arXiv 2006.07733).

    python -m bigmed.main --config configs/byol.py --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is what tools/prepare_dataset.py made. LARS with lr 0.2 * batch / 256 and weight
decay 1.5e-6, heads of 4096 and 256, a teacher's momentum that rises from .996 to 1, the paper's two
unlike views. U: the number of steps, and a batch of 512 (the paper's is 4096). Hours: not measured
on an accelerator yet. Expected metric: depends on the images. `:smoke` runs it on synthetic data in
about a minute.
"""

from configs import common

STEPS = 100_000  # U


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg)
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.augment = common.augmentation("byol", 224)
    config.objective = common.byol_objective(second_view=common.BYOL_SECOND_VIEW)
    config.optim = common.lars(lr=0.2, warmup_steps=1000)
    config.optim.weight_decay = 1.5e-6
    config.stages = ("untrained", "byol")
    config.stage.untrained = common.stage(steps=0)
    config.stage.byol = common.stage(steps=STEPS)
    common.set_evaluators(config, "{data_root}/dataset")
    if arg == "smoke":
        config = common.smoke(config)
        config.objective.update(head_hidden=32, head_dim=16)
    return config
