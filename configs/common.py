"""The base of every config: all keys with their defaults, and what makes a `:smoke` form.

A stage's config is this base with the overrides of `config.stage.<name>`. Values marked U are
defaults of ours that no paper's text was checked for.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def resnet(depth: int, width: int = 1, **overrides) -> ConfigDict:
    """A ResNet v1.5; `stem='small'` for images of 96 pixels and less."""
    settings = {"depth": depth, "width": width, "stem": placeholder(str), "remat": False}
    settings |= {"sk_ratio": placeholder(float), "resnet_d": placeholder(bool)}
    settings |= {"project_first": placeholder(bool)}  # SimCLR's networks of 18 and 34 layers
    return ConfigDict({"name": "resnet", **settings, **overrides})


def vit(variant: str, **overrides) -> ConfigDict:
    """A vision transformer, e.g. 'S/16'."""
    settings = {"variant": variant, "remat": False, "scan": False}
    return ConfigDict({"name": "vit", **settings, **overrides})


def simclr_objective(name: str = "simclr", **overrides) -> ConfigDict:
    """SimCLR's objective, or MICLe's, which differs in its data alone."""
    return ConfigDict(
        {
            "name": name,
            "temperature": 0.1,
            "hidden_norm": True,
            "loss_reduction": "sum",  # as the released code; 'mean' is the paper's formula
            "mask_same_patient": False,
            "head_layers": 2,
            "head_dim": 128,
            "head_hidden": 0,  # 0: the encoder's width
            **overrides,
        }
    )


def bert(**overrides) -> ConfigDict:
    """A text tower as ConVIRT has it: BERT-base, its embeddings and first six layers frozen."""
    settings = {
        "name": "bert",
        "vocab_size": placeholder(int),  # None: the tokeniser's
        "max_length": 512,
        "width": 768,
        "depth": 12,
        "heads": 12,
        "mlp_dim": 3072,
        "pool": "max",
        "pool_special": True,  # over [CLS] and [SEP] too
        "train_after_layer": 6,
        "dropout": 0.0,
        "remat": False,
        **overrides,
    }
    return ConfigDict(settings)


def c2l_objective(**overrides) -> ConfigDict:
    """C2L's objective as its released command trains (arXiv 2007.07423)."""
    return ConfigDict(
        {
            "name": "c2l",
            "losses": ("plain", "image_mix", "feature_mix"),
            "mode": "nce",  # or 'infonce'
            "queue": "sequential",  # or 'snapshot'
            "queue_size": 16_384,
            "temperature": 0.07,
            "momentum": 0.999,
            "momentum_schedule": "constant",
            "head": "linear",  # or 'mlp'
            "head_dim": 128,
            "bn_groups": 1,
            **overrides,
        }
    )


def moco_objective(**overrides) -> ConfigDict:
    """MoCo v1's (arXiv 1911.05722): the first of C2L's losses alone, and a longer queue."""
    own = {"losses": ("plain",), "mode": "infonce", "queue": "snapshot", "queue_size": 65_536}
    return c2l_objective(**{**own, **overrides})


# of BYOL's second view, unlike its first (arXiv 2006.07733, appendix B)
BYOL_SECOND_VIEW = {"blur_prob": 0.1, "solarize_prob": 0.2}


def byol_objective(**overrides) -> ConfigDict:
    """BYOL's objective (arXiv 2006.07733, section 3)."""
    return ConfigDict(
        {
            "name": "byol",
            "momentum": 0.996,
            "momentum_schedule": "cosine",
            "head_hidden": 4096,
            "head_dim": 256,
            "second_view": {},  # what its augmentation has unlike `config.augment`
            **overrides,
        }
    )


def moco_v3_objective(**overrides) -> ConfigDict:
    """MoCo v3's objective for transformers (arXiv 2104.02057, section 4 and its code)."""
    own = {"name": "moco_v3", "temperature": 0.2, "momentum": 0.99}
    own |= {"head_layers": 3, "predictor_norm": True}
    return byol_objective(**{**own, **overrides})


def momentum_sgd(lr: float, milestones: tuple = ()) -> ConfigDict:
    """MoCo's and C2L's SGD: momentum .9, weight decay 1e-4, x0.1 at the milestones or a cosine."""
    config = optimizer("sgd", lr, lr_scaling="none", weight_decay=1e-4, warmup_steps=0)
    config.update(nesterov=False, milestones=milestones)
    config.schedule = "steps" if milestones else "cosine"
    return config


def convirt_objective(**overrides) -> ConfigDict:
    """ConVIRT's objective (arXiv 2010.00747, section 2.2 and appendix)."""
    return ConfigDict(
        {
            "name": "convirt",
            "loss": "softmax",  # or 'sigmoid'
            "temperature": 0.1,
            "learn_temperature": False,
            "logit_bias": -10.0,  # where the sigmoid's bias starts
            "image_weight": 0.75,  # lambda
            "duplicates": "none",  # or 'mask', 'multi'
            "image_image": 0.0,
            "text_text": 0.0,
            "head_layers": 2,
            "head_dim": 512,
            "head_hidden": 0,  # U; 0: the encoder's width
            **overrides,
        }
    )


def augmentation(recipe: str, size: int) -> ConfigDict:
    """A recipe of `bigmed.augment`; every value left None keeps the recipe's."""
    overrides = {
        "crop_area_min": placeholder(float),
        "crop_area_max": placeholder(float),
        "flip_prob": placeholder(float),
        "color_prob": placeholder(float),
        "color_strength": placeholder(float),
        "brightness": placeholder(str),
        "grayscale_prob": placeholder(float),
        "blur_prob": placeholder(float),
        "solarize_prob": placeholder(float),
        "rotation_degrees": placeholder(float),
        "equalize_prob": placeholder(float),
        "cutout_prob": placeholder(float),
        "affine_degrees": placeholder(float),
        "eval_crop": placeholder(float),
        "normalize": placeholder(str),
    }
    return ConfigDict({"recipe": recipe, "size": size, **overrides})


def text(tokeniser: str = "", **overrides) -> ConfigDict:
    """What of the reports is drawn, and its tokeniser; '' for no texts. See `bigmed.data.text`."""
    settings = {
        "tokeniser": tokeniser,  # a folder as transformers saves it, or a WordPiece vocabulary
        "lower_case": placeholder(bool),
        "length": 128,
        "headers": "known",  # or 'mimic'
        "sections": "findings+impression",  # or 'impression', 'either', 'all'
        "unit": "sentence",  # or 'section', 'report'
        "min_tokens": 3,
        "sentences": 1,  # units joined to a text; 0: all of the report
        "texts": 1,  # a row
        **overrides,
    }
    return ConfigDict(settings)


def source(folder: str, split: str, **overrides) -> ConfigDict:
    """One split of a data set; `folder` may begin with '{data_root}' or '{workdir}'."""
    return ConfigDict({"dir": folder, "split": split, **overrides})


def optimizer(
    name: str, lr: float, *, lr_scaling: str, weight_decay: float, warmup_steps: int
) -> ConfigDict:
    """An optimiser of `bigmed.optim` with warm-up, then a cosine to 0."""
    return ConfigDict(
        {
            "name": name,
            "lr": lr,
            "lr_scaling": lr_scaling,
            "warmup_steps": warmup_steps,
            "schedule": "cosine",
            "milestones": (),  # of the schedule 'steps'
            "decay": 0.1,  # of 'steps' and 'plateau'
            "patience": 5,  # validations, of 'plateau'
            "weight_decay": weight_decay,
            "momentum": 0.9,
            "nesterov": True,  # of sgd
            "b1": 0.9,
            "b2": 0.999,
            "grad_clip_norm": 0.0,
            "layer_decay": 1.0,  # of the rate, from a layer of the encoder to the one before it
            "rules": (),
            "freeze": (),
        }
    )


def lars(lr: float, *, warmup_steps: int) -> ConfigDict:
    """LARS as SimCLR v1 has it (arXiv 2002.05709, 2.3 and B.1): lr*B/256, weight decay 1e-6."""
    return optimizer(
        "lars", lr, lr_scaling="linear", weight_decay=1e-6, warmup_steps=warmup_steps
    )


def adamw(lr: float, *, warmup_steps: int) -> ConfigDict:
    """AdamW for runs of a few hundred steps, in which LARS's small relative steps get nowhere."""
    return optimizer(
        "adamw", lr, lr_scaling="none", weight_decay=1e-4, warmup_steps=warmup_steps
    )


def stage(steps: int | None = None, epochs: float | None = None, **sections) -> ConfigDict:
    """A stage: its length (one of the two; 0 steps evaluates what it starts from) and overrides."""
    config = ConfigDict({"steps": placeholder(int), "epochs": placeholder(float), **sections})
    config.steps, config.epochs = steps, epochs
    return config


# what is loaded of a network whose head is left behind
ENCODER = ("(params|batch_stats)/backbone/.*",)


def init_from(stage: str = "", checkpoints: str = "", weights: str = "", **more) -> ConfigDict:
    """Where a stage's weights come from: one of three.

    An earlier stage; a folder of checkpoints; or foreign weights, a folder of
    tools/import_weights.py, or, with their `naming`, what that tool reads. `text_weights` is the
    same for the text tower, whose `text_naming` and `text_prefix` it has.
    """
    known = {
        "network": "student",  # or 'teacher', of a stage or checkpoints that have one
        "naming": "",
        "prefix": placeholder(str),  # within the file; None: found out
        "text_weights": "",
        "text_naming": "",
        "text_prefix": placeholder(str),
        "allow_pickle": False,  # of files that you trust
        "load": (),
        "skip": (),
    }
    return ConfigDict(
        {"stage": stage, "checkpoints": checkpoints, "weights": weights, **known, **more}
    )


# of ChestX-ray14's classes, those that its 1,000 images of the real_* configs have enough of
CXR_FINDINGS = ("Pneumonia", "Infiltration", "Atelectasis", "Edema", "Effusion")


def base(arg: str = "", *valid: str) -> ConfigDict:
    """Every key of a run; a config fills in data, stages and evaluators.

    Args:
      arg: what was given to the config behind a colon.
      valid: what may be, beside nothing and 'smoke'.

    Raises:
      ValueError: it is none of these; `bigmed.main` makes a line of it.
    """
    valid = (*valid, "smoke")
    if arg and arg not in valid:
        raise ValueError(f"the config's argument '{arg}': valid: {', '.join(valid)}")
    config = ConfigDict()
    config.seeds = (0,)
    config.precision = "f32"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.data_root = ""
    config.steps = placeholder(int)
    config.epochs = placeholder(float)
    config.on_non_finite = "stop"
    # the batch in so many parts through the encoders, for larger batches than fit; `bigmed.step`
    config.micro_batch = ConfigDict({"count": 1, "batch_norm": "micro"})
    config.checkpoint = ConfigDict({"every": 500, "keep": 2})
    # loss on held-out data every so many steps (0: never); see `bigmed.validation`
    config.validate = ConfigDict({"sources": (), "every": 0, "keep": "last", "patience": 0})
    config.log = ConfigDict({"every": 10})
    config.pictures = True  # in the report; they show what the data sets hold
    config.init_from = init_from()
    config.data = ConfigDict(
        {
            "sources": (),
            "source": ConfigDict(),
            "batch_size": 512,
            "canvas": 256,
            "channels": 1,
            "pairs": placeholder(str),
            "single_image": "augment",
            "text": text(),
            "workers": 0,
            "threads": placeholder(int),
            "prefetch": 4,
        }
    )
    config.model = resnet(50)
    config.text_model = bert()  # of objectives with texts
    config.augment = augmentation("cxr", 224)
    config.objective = simclr_objective()
    config.optim = lars(lr=0.3, warmup_steps=0)
    config.stages = ()
    config.stage = ConfigDict()
    config.evaluate = ()
    config.evaluator = ConfigDict()
    config.sweep = ConfigDict({"fractions": (), "seeds": (0,)})  # few labels; `bigmed.sweep`
    return config


def set_data(config: ConfigDict, **sources: ConfigDict) -> None:
    """The data sets to train on, by name."""
    config.data.sources = tuple(sources)
    config.data.source = ConfigDict(sources)


def evaluator(folder: str, name: str, **overrides) -> ConfigDict:
    """Linear probe ('linear', 'linear_sgd') or 'knn' on the splits of one labelled data set."""
    settings = {
        "name": name,
        **{split: source(folder, split) for split in ("train", "val", "test")},
        "representation": "encoder",  # or 'head_1', ...: after so many layers of the head
        "classes": (),  # the label columns to use; () for all
        "fraction": 1.0,  # of the training patients whose labels may be used
        # what label -1 counts as: 'ignore', 'zeros', 'ones', 'smooth', 'three_class'
        "uncertain": "ignore",
        "average": placeholder(str),  # over the images of a case: 'features', 'scores'
        "details": True,  # metrics at thresholds, and calibration
        "interval": "bootstrap",  # or 'delong' of single classes
        "select_by": "auc_macro",  # on the validation split
        "refit": False,  # on train and validation together, once chosen
        "transductive": False,  # whether pretraining was meant to see images of val or test
        "num_resamples": 1000,  # of patients, for the 95 % intervals
        "batch_size": 256,
        "seed": 0,
        **overrides,
    }
    return ConfigDict(settings)


def finetune(folder: str, **overrides) -> ConfigDict:
    """Fine-tuning on the splits of one labelled data set; SimCLR's protocol on a smaller grid."""
    probe = evaluator(folder, "finetune")
    for key in ("representation", "refit", "batch_size"):
        del probe[key]
    optim = optimizer("sgd", 0.0, lr_scaling="none", weight_decay=0.0, warmup_steps=0)
    settings = {
        **probe,
        "optim": optim,  # its lr and weight_decay are the grid's
        "learning_rates": (1e-3, 1e-2, 1e-1),
        "weight_decays": (0.0, 1e-4),
        "decay_over_rate": False,  # SimCLR divides the decay by the rate
        "batch_size": 64,
        "steps": placeholder(int),
        "epochs": placeholder(float),
        "head_only_steps": 0,
        "head_only_rate": 1e-3,
        "from_layer": 0,  # layers of the projection head that are kept
        "class_weights": "none",  # or 'balanced'
        "dropout": 0.0,
        "batch_norm": "train",  # or 'frozen'
        "mixup": 0.0,
        "augment": {"recipe": "crop_flip"},
        "evaluate_every": placeholder(int),  # steps; None: once an epoch
        "patience": 0,  # looks at validation; 0: runs are not ended early
        "runs": 1,  # of the chosen setting
        "eval_batch_size": 256,
        **overrides,
    }
    return ConfigDict(settings)


def set_evaluators(config: ConfigDict, folder: str, **overrides) -> None:
    """Evaluates every stage by linear probe and k-NN on one labelled data set."""
    config.evaluate = ("linear", "knn")
    config.evaluator = ConfigDict(
        {name: evaluator(folder, name, **overrides) for name in config.evaluate}
    )


def retrieval(images: ConfigDict, **overrides) -> ConfigDict:
    """How many of the images nearest to each one of a source are of its class."""
    settings = {
        "name": "retrieval",
        "query": images,
        "candidates": images,
        "representation": "encoder",
        "ks": (1, 5, 10, 50),
        "classes": (),
        "uncertain": "ignore",
        "transductive": False,
        "num_resamples": 1000,
        "batch_size": 256,
        "seed": 0,
        **overrides,
    }
    return ConfigDict(settings)


def add_retrieval(config: ConfigDict, images: ConfigDict, reports: ConfigDict, **overrides) -> None:
    """Images by an image, and by a report through the two towers; `overrides` are of the first."""
    config.evaluate += ("image_image", "text_image")
    config.evaluator.image_image = retrieval(images, **overrides)
    config.evaluator.text_image = retrieval(
        reports,
        representation="image",
        query_representation="text",
        text=ConfigDict(config.data.text),
    )


def zero_shot(folder: str, prompts: str, **overrides) -> ConfigDict:
    """Classes by a file of `configs/prompts`, on the test split of a labelled data set."""
    settings = {
        "name": "zero_shot",
        "prompts": f"configs/prompts/{prompts}.json",
        "test": source(folder, "test"),
        "val": source(folder, "val"),  # None: no thresholds, and no metrics that need them
        "representation": "image",
        "query_representation": "text",
        "aggregate": "mean_embedding",  # or 'mean_logit', 'max_logit'
        "temperature": placeholder(float),  # None: the one of training
        "checkpoints": (),  # further weights of this network, to average with
        "classes": (),
        "uncertain": "ignore",
        "num_resamples": 1000,
        "batch_size": 256,
        "seed": 0,
        **overrides,
    }
    return ConfigDict(settings)


def add_zero_shot(
    config: ConfigDict, folder: str, prompts: str, name: str = "zero_shot", **overrides
) -> None:
    """Zero-shot classification by the config's two towers."""
    config.evaluate += (name,)
    text = ConfigDict(config.data.text)
    config.evaluator[name] = zero_shot(folder, prompts, text=text, **overrides)


def set_micle_stages(config: ConfigDict, *, simclr_steps: int, further_steps: int) -> None:
    """Untrained, SimCLR, then from its weights MICLe, and as many further steps of SimCLR."""
    more = {
        "init_from": init_from(stage="simclr"),
        "optim": adamw(lr=3e-4, warmup_steps=10),  # about a third of 1e-3, as the paper (U)
    }
    config.stages = ("untrained", "simclr", "micle", "simclr_longer")
    config.stage.untrained = stage(steps=0)
    config.stage.simclr = stage(steps=simclr_steps)
    config.stage.micle = stage(
        steps=further_steps,
        objective=simclr_objective("micle", temperature=config.objective.temperature),
        data={"pairs": "case"},
        **more,
    )
    config.stage.simclr_longer = stage(steps=further_steps, **more)


def use_phantom(config: ConfigDict, num_patients: int, size: int) -> None:
    """Trains and evaluates on the embedded synthetic data set."""
    folder = "{workdir}/data/phantom"
    config.phantom = ConfigDict({"num_patients": num_patients, "size": size, "seed": 0})
    config.data.canvas = size
    config.data.channels = 1
    set_data(config, phantom=source(folder, "train"))
    set_evaluators(config, folder)


def smoke(config: ConfigDict) -> ConfigDict:
    """The same stages on the synthetic data set, small enough for two CPU cores."""
    use_phantom(config, num_patients=60, size=48)
    config.seeds = (0,)
    config.model = vit("mu/8")  # compiles in seconds
    config.augment.size = 32
    config.data.batch_size = 16
    config.checkpoint.every = 4
    config.log.every = 1
    for name in config.stages:
        stage = config.stage[name]
        for section in ("model", "augment", "precision"):
            if section in stage:
                del stage[section]
        if "data" in stage:
            stage.data = ConfigDict({k: v for k, v in stage.data.items() if k == "pairs"})
        if stage.steps or stage.epochs:
            stage.epochs = None
            stage.steps = 6
        if "optim" in stage:
            stage.optim.warmup_steps = 2
    config.optim.warmup_steps = 2
    return config


def smoke_with_texts(config: ConfigDict) -> ConfigDict:
    """`smoke` for an objective with texts, which are those of the synthetic data set."""
    config = smoke(config)
    folder = "{workdir}/data/phantom"
    config.phantom.num_patients = 200  # enough of them for a batch to validate on
    config.data.source.held_out = source(folder, "val")
    config.data.text = text(f"{folder}/vocab.txt", length=24, sections="all")
    config.text_model = bert(width=32, depth=2, heads=2, mlp_dim=64, train_after_layer=1)
    add_retrieval(config, source(folder, "test"), source(folder, "test"))
    add_zero_shot(config, folder, "synthetic_phantom")
    config.validate.every = 3
    config.optim.warmup_steps = 0
    return config
