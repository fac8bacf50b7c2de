"""ConVIRT: images and their reports, contrasted in both directions (arXiv 2010.00747).

    python tools/import_weights.py --from huggingface --src ClinicalBERT --model clinicalbert \\
        --out FOLDER/clinicalbert
    python tools/import_weights.py --from torchvision --src resnet50.safetensors --model resnet50 \\
        --normalize imagenet --out FOLDER/resnet50
    python -m bigmed.main --config configs/convirt.py --workdir DIR --config.data_root=FOLDER

FOLDER/dataset is what tools/prepare_dataset.py made with a column of reports, FOLDER/tokeniser a
folder with ClinicalBERT's tokeniser (any tokeniser and tower that belong together will do). As the
argument, 'clip' learns the temperature of a symmetric loss, 'siglip' is the sigmoid loss. Values
marked U are defaults of ours that the paper does not state. Hours: not measured on an accelerator
yet (the paper: 3 days on one Titan RTX). Expected metric: depends on the reports; docs/results.md
has small real ones. `common.add_zero_shot` adds classification by prompts for findings that your
labels name, as in real_convirt.py. `:smoke` runs it on synthetic data in about a minute.
"""

from configs import common


def get_config(arg: str = ""):
    """The config; `arg` 'clip', 'siglip', or 'smoke' for a few steps on synthetic data."""
    config = common.base(arg, "clip", "siglip")
    config.data.channels = 3  # grey images are repeated for the ImageNet stem
    config.data.batch_size = 32
    config.data.text = common.text("{data_root}/tokeniser")  # length 128: U
    study = {"case": "study_id"}
    common.set_data(config, dataset=common.source("{data_root}/dataset", "train", **study))
    config.data.source.held_out = common.source("{data_root}/dataset", "val", **study)
    config.model = common.resnet(50, stem="torchvision")
    config.text_model = common.bert(vocab_size=28996)  # ClinicalBERT's
    config.augment = common.augmentation("convirt", 224)
    config.augment.normalize = "imagenet"  # U
    config.objective = common.convirt_objective()
    # validation every 5,000 steps; the rate halves after 5 without a decrease
    config.optim = common.optimizer(
        "adam", 1e-4, lr_scaling="none", weight_decay=1e-6, warmup_steps=0
    )
    config.optim.update(schedule="plateau", decay=0.5, patience=5)
    # as torch.optim.Adam decays: all that is trained, biases and norms too
    decayed, others = r"(?!probe/|logit_).*", r"(probe/|logit_).*"
    config.optim.rules = ((decayed, "adapted"), (others, "plain"))
    config.validate.update(sources=("held_out",), every=5000, keep="best")
    config.stages = ("untrained", "convirt")
    config.stage.untrained = common.stage(steps=0)
    config.stage.convirt = common.stage(
        steps=1_000_000,
        init_from=common.init_from(
            weights="{data_root}/resnet50", text_weights="{data_root}/clinicalbert"
        ),
    )
    common.set_evaluators(config, "{data_root}/dataset")
    test = common.source("{data_root}/dataset", "test")
    common.add_retrieval(config, test, test)
    if arg == "clip":
        config.objective.update(temperature=0.07, learn_temperature=True, image_weight=0.5)
    if arg == "siglip":
        config.objective.update(loss="sigmoid", temperature=0.1, learn_temperature=True)
    if arg == "smoke":
        config = common.smoke_with_texts(config)
        config.objective.head_dim = 32
        config.stage.convirt.init_from = common.init_from()
    return config
