"""The encoder of a run -> a folder that timm, torchvision or transformers load.

    python tools/export_weights.py --workdir RUN --to timm --out DIR [--stage 02_micle]
        [--network teacher]

Writes model.safetensors, config.json and a model card (README.md) with what was measured, and its
intervals. `--to npz` writes the arrays of Google's naming, `--to onnx` a graph that onnxruntime has
been asked for the features of random images: written only where they are ours to 1e-4.
"""

import pathlib
import sys

import command  # beside this file
from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.")
STAGE = flags.DEFINE_string("stage", None, "The folder of a stage in it, where it has several.")
NETWORK = flags.DEFINE_enum(
    "network", "student", ["student", "teacher"],
    "The one that was trained, or its moving average (C2L, MoCo, BYOL, MoCo v3).",
)  # fmt: skip
TO = flags.DEFINE_string("to", None, "timm, torchvision, huggingface, npz or onnx.")
OUT = flags.DEFINE_string("out", None, "The folder to make.")
LICENCE = flags.DEFINE_string("license", "unknown", "For the model card; yours to choose.")


def _export() -> None:
    from bigmed.convert import export
    from bigmed.convert.weights import check_out

    check_out(pathlib.Path(OUT.value))
    weights, facts = export.from_run(pathlib.Path(WORKDIR.value), STAGE.value, NETWORK.value)
    card = export.model_card(weights, facts, TO.value, LICENCE.value)
    network = f"the {facts['network']} of '{facts['stage']}', step {facts['steps']}"
    if TO.value == "onnx":
        from bigmed.convert import onnx

        difference = onnx.export(weights, pathlib.Path(OUT.value), card)
        print(f"{OUT.value}: {network}; greatest difference of features: {difference:.1e}")
        return
    tensors = export.export(weights, TO.value, pathlib.Path(OUT.value), card)
    print(f"{OUT.value}: {len(tensors)} tensors of {network}")


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(command.run(sys.argv, (WORKDIR, TO, OUT), _export))
