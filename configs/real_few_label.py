"""Real chest X-rays on two CPU cores: five encoders with few labels, and at another site.

    python -m bigmed.main --config configs/real_few_label.py --workdir DIR --config.data_root=DATA

DATA/cxr_nih, cxr_covid, cxr_kermany and cxr_actualmed are prepared, and DATA/minilm and
DATA/tokeniser made, as docs/results.md says. Pretrained on the training films of the first two;
ConVIRT on those of the second, which have notes. The labels of a tenth to all of the training
patients are used, each share drawn five times. Two targets: five findings of ChestX-ray14, whose
head is also applied unchanged to all of Kermany's children; and pneumonia of those children, of
whom nothing was seen in pretraining, whose head is also applied to cxr_actualmed. Three seeds.
Hours: 0.3 on 2 CPU cores. Expected metric: see docs/results.md. Network, image size and number of
steps are what two cores finish; values marked U are ours.
"""

from configs import common, real_convirt

PNEUMONIA = ("normal", "bacterial_pneumonia", "viral_pneumonia")


def get_config(arg: str = ""):
    """The config; `arg` 'smoke' for a run of a few steps on synthetic data."""
    config = real_convirt.get_config()
    texts = {key: config[key] for key in ("text_model", "objective", "optim", "validate")}
    of_texts = {"sources": ("cxr_covid",), "batch_size": 10, "text": config.data.text}
    convirt = common.stage(
        steps=190,
        augment=config.augment,
        data=of_texts,
        init_from=common.init_from(text_weights="{data_root}/minilm"),
        **texts,
    )
    config = common.base(arg)
    config.seeds = (0, 1, 2)
    config.model = common.resnet(18)
    config.data.canvas = 128
    config.data.batch_size = 64
    sources = {s: common.source("{data_root}/" + s, "train") for s in ("cxr_nih", "cxr_covid")}
    common.set_data(config, **sources)
    config.data.source.held_out = common.source("{data_root}/cxr_covid", "val")
    config.augment = common.augmentation("cxr", 64)
    config.objective = common.simclr_objective(temperature=0.2)  # U
    config.optim = common.adamw(lr=1e-3, warmup_steps=10)
    config.checkpoint.every = 100
    common.set_micle_stages(config, simclr_steps=80, further_steps=40)
    config.stages += ("c2l", "convirt")
    config.stage.c2l = common.stage(
        steps=200,
        data={"batch_size": 32},
        augment=common.augmentation("c2l", 64),
        objective=common.c2l_objective(
            mode="infonce", queue="snapshot", queue_size=512, temperature=0.2, momentum=0.99
        ),  # U, as configs/real_c2l.py
        optim=common.momentum_sgd(0.03),
    )
    config.stage.convirt = convirt
    nih, children = "{data_root}/cxr_nih", "{data_root}/cxr_kermany"
    everyone = common.source(children, "train+val+test")
    elsewhere = common.source("{data_root}/cxr_actualmed", "train+val+test")
    findings = {
        "classes": common.CXR_FINDINGS,
        "details": False,  # 1,152 cells
        "shift": {
            "kermany": {"source": everyone, "label_map": {"Pneumonia": PNEUMONIA[1:]}},
        },
    }
    pneumonia = {
        "classes": PNEUMONIA,
        "details": False,
        "shift": {
            # Covid-19 is a viral pneumonia
            "actualmed": {
                "source": elsewhere,
                "label_map": {"normal": "normal", "viral_pneumonia": "covid19"},
            },
        },
    }
    config.evaluate = ("findings", "findings_knn", "pneumonia", "pneumonia_knn")
    config.evaluator = {
        "findings": common.evaluator(nih, "linear", **findings),
        "findings_knn": common.evaluator(nih, "knn", **findings),
        "pneumonia": common.evaluator(children, "linear", **pneumonia),
        "pneumonia_knn": common.evaluator(children, "knn", **pneumonia),
    }
    config.sweep.update(fractions=(0.1, 0.25, 0.5, 1.0), seeds=(0, 1, 2, 3, 4))
    if arg == "smoke":
        return _smoke(config)
    return config


def _smoke(config):
    """The same on synthetic data: one evaluator, two fractions, no text weights."""
    config = common.smoke_with_texts(config)
    convirt = config.stage.convirt
    convirt.init_from = common.init_from()
    convirt.data = {"text": config.data.text}
    config.data.text = common.text()
    convirt.text_model = config.text_model
    convirt.validate = {"sources": ("held_out",), "every": 3, "keep": "best"}
    config.evaluate = ("linear",)
    config.validate.every = 0
    config.sweep.update(fractions=(0.5, 1.0), seeds=(0, 1))
    return config
