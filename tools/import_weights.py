"""Foreign weights of an encoder -> a folder that bigmed starts from and extracts features with.

    python tools/import_weights.py --from torchvision --src resnet50.safetensors --model resnet50 \
        --normalize imagenet --out DIR
    python tools/import_weights.py --from huggingface --src FOLDER --normalize imagenet --out DIR
    python tools/import_weights.py --from simclr --src model.ckpt-250228 --model simclr_r50_1x_sk1 \
        --normalize none --out DIR
    python tools/import_weights.py --from remedis --src cxr-50x1-remedis-m --model bit_r50x1 \
        --normalize none --size 448 --out DIR

--src is a .safetensors or .npz file, or a folder with model.safetensors (whole or in shards) and,
where --model is left out, a config.json; or TensorFlow's (`pip install 'bigmed[tf]'`): a
checkpoint's prefix, or a SavedModel's folder. A pickle (.pth, .bin, .ckpt) is read on request
alone, by PyTorch in a process of its own. Every tensor of the source is used or listed as left
over; a leaf that the source does not have is an error.

Then: --config.init_from.weights=DIR (with the same --config.model, size, channels and normalize),
or tools/extract_features.py --model DIR. A stage also starts from the source itself:
--config.init_from.weights=SRC --config.init_from.naming=FROM, with .prefix and .allow_pickle.
"""

import pathlib
import sys

import command  # beside this file
from absl import app, flags

from bigmed.errors import UserError, did_you_mean

FROM = flags.DEFINE_string(
    "from", None, "The naming: torchvision, timm, huggingface, npz, simclr, remedis, ..."
)
SRC = flags.DEFINE_string("src", None, "The file, folder or TensorFlow checkpoint.")
MODEL = flags.DEFINE_string("model", None, "A published name, e.g. resnet50; else config.json's.")
OUT = flags.DEFINE_string("out", None, "The folder to make.")
NORMALIZE = flags.DEFINE_enum(
    "normalize", None, ["none", "imagenet", "half"],
    "The pixels the weights were trained on: in [0, 1], so with ImageNet's moments, in [-1, 1]; "
    "needed but for a text tower.",
)  # fmt: skip
SIZE = flags.DEFINE_integer("size", 224, "Of the images; position codes are resampled to it.")
CHANNELS = flags.DEFINE_integer("channels", 3, "Of the images, 1 or 3; the stem is refolded.")
PREFIX = flags.DEFINE_string("prefix", None, "The nest that holds the model; else found out.")
ALLOW_PICKLE = flags.DEFINE_bool("allow_pickle", False, "Read a pickle that you trust.")


def _import() -> None:
    from bigmed.convert import foreign, weights
    from bigmed.models.catalogue import named_models

    named = named_models()
    if MODEL.value is not None and MODEL.value not in named:
        raise UserError(f"--model={MODEL.value}: {did_you_mean(MODEL.value, named)}")
    weights.check_out(pathlib.Path(OUT.value))
    source = pathlib.Path(SRC.value)
    found = foreign.take(
        source,
        FROM.value,
        named.get(MODEL.value),
        size=SIZE.value,
        channels=CHANNELS.value,
        normalize=NORMALIZE.value,
        prefix=PREFIX.value,
        allow_pickle=ALLOW_PICKLE.value,
    )
    origin = {"file": source.name, "sha256": weights.sha256(source), "naming": FROM.value}
    origin |= {} if PREFIX.value is None else {"prefix": PREFIX.value}
    weights.save(found, pathlib.Path(OUT.value), origin)
    count = sum(leaf.size for leaf in found.leaves.values())
    print(f"{OUT.value}: {len(found.leaves)} leaves, {count:,} numbers, of {found.model}")
    left_over = foreign.describe_left_over(found)
    if left_over:
        print(f"left over: {left_over}")


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(command.run(sys.argv, (FROM, SRC, OUT), _import))
