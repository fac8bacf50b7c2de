"""The encoder of a run -> a folder that timm, torchvision or transformers load.

    python tools/export_weights.py --workdir RUN --to timm --out DIR [--stage 02_micle]

Writes model.safetensors, config.json and a model card (README.md) with what was measured, and its
intervals. `--to npz` writes the arrays of Google's naming.
"""

import pathlib
import sys

from absl import app, flags

from bigmed.errors import EXIT_OK, EXIT_USER_ERROR, UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.")
STAGE = flags.DEFINE_string("stage", None, "The folder of a stage in it; else the last one done.")
TO = flags.DEFINE_string("to", None, "timm, torchvision, huggingface or npz.")
OUT = flags.DEFINE_string("out", None, "The folder to make.")
LICENCE = flags.DEFINE_string("license", "unknown", "For the model card; yours to choose.")


def run(argv: list[str]) -> int:
    """Parses the flags, writes the folder and returns the exit code."""
    try:
        flags.FLAGS(argv)
        for flag in (WORKDIR, TO, OUT):
            if flag.value is None:
                raise UserError(f"--{flag.name} is needed")
        from bigmed.convert import export

        weights, facts = export.from_run(pathlib.Path(WORKDIR.value), STAGE.value)
        card = export.model_card(weights, facts, TO.value, LICENCE.value)
        tensors = export.export(weights, TO.value, pathlib.Path(OUT.value), card)
    except (UserError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{OUT.value}: {len(tensors)} tensors of '{facts['stage']}', step {facts['steps']}")
    return EXIT_OK


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(run(sys.argv))
