"""Real skin lesions on two CPU cores: SimCLR, then MICLe, against untrained and more SimCLR.

    python -m bigmed.main --config configs/real_derm.py --workdir DIR --config.data_root=DATA

DATA/derm_ham10000 is prepared as docs/results.md says: 5,352 photographs of 2,809 lesions, of which
1,956 have two to six; the nearest open stand-in for the dermatology cases of "Big Self-Supervised
Models Advance Medical Image Classification" (arXiv 2101.05224). The set names lesions and no
patients, so splits and intervals are by lesion. Three seeds. Hours: 0.3 on 2 CPU cores.
Expected metric: linear-probe macro AUC 0.73 untrained, 0.77 after SimCLR, 0.78 after MICLe
(docs/results.md). Network, image size and number of steps are what two cores finish, far below the
paper's.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg)
    config.seeds = (0, 1, 2)
    config.model = common.resnet(18)
    config.data.canvas = 128
    config.data.channels = 3
    config.data.batch_size = 64
    config.augment = common.augmentation("derm", 48)
    config.objective = common.simclr_objective(temperature=0.2)  # U
    config.optim = common.adamw(lr=1e-3, warmup_steps=10)
    config.checkpoint.every = 40
    folder = "{data_root}/derm_ham10000"
    common.set_data(config, derm_ham10000=common.source(folder, "train"))
    common.set_micle_stages(config, simclr_steps=120, further_steps=60)
    common.set_evaluators(config, folder)
    return common.smoke(config) if arg == "smoke" else config
