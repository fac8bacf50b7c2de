"""SimCLR, then MICLe on cases with several images, then the same steps of SimCLR for comparison.

    python -m bigmed.main --config configs/micle.py --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is what tools/prepare_dataset.py made, with patients (or studies) named. The protocol
of "Big Self-Supervised Models Advance Medical Image Classification" (arXiv 2101.05224) for
dermatology: MICLe starts from SimCLR's encoder and head, at a third of the learning rate, in
batches of 128 cases. Values marked U were read in secondary sources or are defaults of ours.
Hours: not measured on an accelerator yet. Expected metric: depends on the images; see
docs/results.md for real ones. `:smoke` runs it on synthetic data in about a minute.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg)
    config.data.channels = 3
    config.augment = common.augmentation("derm", 224)
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train"))
    config.optim = common.lars(lr=0.3, warmup_steps=1000)
    more = {
        "init_from": common.init_from(stage="simclr"),
        # U: batch 128, base rate 0.1, 100,000 steps
        "optim": common.lars(lr=0.1, warmup_steps=1000),
    }
    config.stages = ("untrained", "simclr", "micle", "simclr_longer")
    config.stage.untrained = common.stage(steps=0)
    config.stage.simclr = common.stage(steps=150_000)  # U, at batch 512
    config.stage.micle = common.stage(
        steps=100_000,
        objective=common.simclr_objective("micle"),
        data={"pairs": "case", "batch_size": 128},
        **more,
    )
    config.stage.simclr_longer = common.stage(steps=100_000, data={"batch_size": 128}, **more)
    common.set_evaluators(config, "{data_root}/dataset")
    return common.smoke(config) if arg == "smoke" else config
