"""Real chest X-rays on two CPU cores: SimCLR, then MICLe, against untrained and more SimCLR.

    python -m bigmed.main --config configs/real_cxr.py --workdir DIR --config.data_root=DATA

DATA/cxr_nih and DATA/cxr_covid are prepared as docs/results.md says (999 and 373 images; 480 and
128 training patients, of whom many have several images). Three seeds. Hours: 0.6 on 2 CPU cores
shared with other work. Expected metric: linear-probe macro AUC of the five findings 0.65 untrained,
0.73 after SimCLR and after MICLe (docs/results.md). Network, image size and number of steps are
what two cores finish, far below the paper's; they test the method's order, not its level.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg)
    config.seeds = (0, 1, 2)
    config.model = common.resnet(18)
    config.data.canvas = 128
    config.data.batch_size = 64
    config.augment = common.augmentation("cxr", 64)
    config.objective = common.simclr_objective(temperature=0.2)  # U: the paper's grid is .1 .5 1
    config.optim = common.adamw(lr=1e-3, warmup_steps=10)
    config.checkpoint.every = 40
    common.set_data(
        config,
        cxr_nih=common.source("{data_root}/cxr_nih", "train"),
        cxr_covid=common.source("{data_root}/cxr_covid", "train"),
    )
    common.set_micle_stages(config, simclr_steps=80, further_steps=40)
    nih, covid = "{data_root}/cxr_nih", "{data_root}/cxr_covid"
    aetiology = ("covid19", "bacterial_pneumonia", "fungal_pneumonia")
    config.evaluate = ("linear", "knn", "linear_covid")
    config.evaluator = {
        "linear": common.evaluator(nih, "linear", classes=common.CXR_FINDINGS),
        "knn": common.evaluator(nih, "knn", classes=common.CXR_FINDINGS),
        "linear_covid": common.evaluator(covid, "linear", classes=aetiology),
    }
    return common.smoke(config) if arg == "smoke" else config
