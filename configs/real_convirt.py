"""Real chest X-rays and their notes on two CPU cores: ConVIRT with a trained or a new text tower.

    python -m bigmed.main --config configs/real_convirt.py --workdir DIR --config.data_root=DATA

DATA/cxr_covid and DATA/cxr_nih are prepared, and DATA/minilm and DATA/tokeniser made, as
docs/results.md says: the tower is MiniLM's BERT of six layers. Cases are patients; a row is one of
a patient's films and a sentence of its note. Three seeds. Hours: 0.3 on 2 CPU cores.
Expected metric: see docs/results.md. Network, image size and number of steps are what two cores
finish, and a hundred patients are few; values marked U are ours.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = common.base(arg)
    config.seeds = (0, 1, 2)
    config.model = common.resnet(18)
    # MiniLM's shape; of its six layers the first three are frozen, as half of ConVIRT's
    config.text_model = common.bert(width=384, depth=6, mlp_dim=1536, train_after_layer=3)
    config.data.canvas = 128
    config.data.batch_size = 10  # as many as there are patients to validate on
    config.data.text = common.text("{data_root}/tokeniser", length=48, sections="all")
    common.set_data(config, cxr_covid=common.source("{data_root}/cxr_covid", "train"))
    config.data.source.held_out = common.source("{data_root}/cxr_covid", "val")
    config.augment = common.augmentation("convirt", 64)
    config.objective = common.convirt_objective(head_dim=128)  # U; the paper's is 512
    config.optim = common.optimizer(
        "adam", 1e-4, lr_scaling="none", weight_decay=1e-6, warmup_steps=0
    )
    config.optim.update(schedule="plateau", decay=0.5, patience=5)
    config.validate.update(sources=("held_out",), every=10, keep="best")  # U
    config.checkpoint.every = 100
    config.stages = ("untrained", "scratch", "convirt")
    config.stage.untrained = common.stage(steps=0)
    config.stage.scratch = common.stage(steps=190, text_model={"train_after_layer": -1})
    config.stage.convirt = common.stage(
        steps=190, init_from=common.init_from(text_weights="{data_root}/minilm")
    )
    common.set_evaluators(config, "{data_root}/cxr_nih", classes=common.CXR_FINDINGS)
    nih, covid = (common.source("{data_root}/" + name, "test") for name in ("cxr_nih", "cxr_covid"))
    # all of these films that show anything show pneumonia, which so tells none apart
    others = tuple(name for name in common.CXR_FINDINGS if name != "Pneumonia")
    common.add_retrieval(config, nih, covid, classes=others)
    common.add_zero_shot(
        config, "{data_root}/cxr_nih", "chestxray14", classes=common.CXR_FINDINGS
    )
    common.add_zero_shot(
        config, "{data_root}/cxr_covid", "chest_pneumonia", name="zero_shot_covid"
    )
    if arg == "smoke":
        config = common.smoke_with_texts(config)
        config.stage.convirt.init_from = common.init_from(stage="scratch")
    return config
