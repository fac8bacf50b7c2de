"""Label-efficiency curves: how far few labelled patients go, by linear probe and k-NN.

    python -m bigmed.main --config configs/few_label.py --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is what tools/prepare_dataset.py made, with labels. SimCLR is trained on its images
as in configs/simclr.py, and compared with the untrained network at every fraction of the labelled
patients and with every seed of the draw; smaller fractions are subsets of larger ones. `:given`
trains nothing and compares weights that another run made instead (the model must be that run's):

    python -m bigmed.main --config configs/few_label.py:given --workdir DIR \\
        --config.data_root=FOLDER \\
        --config.stage.given.init_from.checkpoints=RUN/01_simclr/checkpoints

Fine-tuning at every fraction is slow, and asked for by
`--config.evaluate="('linear','knn','finetune')"`; its grid is `config.evaluator.finetune`.
Other fractions (`--config.sweep.fractions='(0.1,1.0)'`) in the same DIR compute what is missing.
Hours: configs/simclr.py's, and for `:given` 0.1 on any hardware. Expected metric: depends on the
images; the curves rise, and the trained network's lies above the untrained one's. `:smoke` runs it
on synthetic data.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'given' for weights from elsewhere, 'smoke' for synthetic data."""
    config = common.base(arg, "given")
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.optim = common.lars(lr=0.3, warmup_steps=100)  # as configs/simclr.py
    config.stage.untrained = common.stage(steps=0)
    if arg == "given":
        config.stages = ("untrained", "given")
        # The head is left fresh: features come from the encoder, whatever head it had.
        given = common.init_from(load=common.ENCODER)
        config.stage.given = common.stage(steps=0, init_from=given)
    else:
        config.stages = ("untrained", "simclr")
        config.stage.simclr = common.stage(epochs=100.0)
    folder = "{data_root}/dataset"
    common.set_evaluators(config, folder)
    config.sweep.update(fractions=(0.01, 0.05, 0.1, 0.25, 0.5, 1.0), seeds=(0, 1, 2, 3, 4))
    if arg == "smoke":
        config.sweep.update(fractions=(0.25, 0.5, 1.0), seeds=(0, 1))
        config, folder = common.smoke(config), "{workdir}/data/phantom"
    config.evaluator.finetune = common.finetune(folder, epochs=30.0, patience=10)
    return config
