"""Times encoders beside the same ones of transformers and PyTorch, in one run.

    python tools/bench_models.py --models=resnet50,densenet121,vit_s16 --batch=8
    python tools/bench_models.py --models=resnet50 --batch=256 --precision=bf16
    python tools/bench_models.py --models=resnet50,vit_s16 --batch=8 --remat

Forward is in evaluation mode without gradients; a training step is forward in training mode,
backward by the parameters, and plain SGD; neither has dropout. The two libraries take turns.
PyTorch runs on JAX's kind of device if it has it (on a GPU in bf16 and compiled), else on the CPU,
on all cores, as it is. For texts, --size is the number of tokens. Where the features are a class
token, our last block computes that one's alone, as in the training loop; PyTorch's computes all.

GFLOP/s are ours, by XLA's count of the forward pass, three times of it in training; on an
accelerator MFU is their share of its bf16 peak.

With --remat a training step takes turns with those that compute activations anew in their
backward pass (`config.model.remat`, with `config.model.scan` or without). The table says what each
keeps from its forward for its backward pass, what XLA plans for temporary buffers in all, and its
time over the plain step's.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from absl import app, flags

from bigmed.host_memory import keep_freed_memory

keep_freed_memory()  # before jax starts its threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import timing  # noqa: E402  # beside this file

from bigmed import precision  # noqa: E402
from bigmed.convert import weights  # noqa: E402
from bigmed.errors import UserError, did_you_mean  # noqa: E402
from bigmed.models import densenet  # noqa: E402
from bigmed.models.catalogue import build, named_models  # noqa: E402

MODELS = flags.DEFINE_list("models", ["resnet50", "vit_s16"], "Published names.")
BATCH = flags.DEFINE_integer("batch", 8, "Images or texts a step.")
SIZE = flags.DEFINE_integer("size", 224, "Of the images in pixels, or texts in tokens.")
PRECISION = flags.DEFINE_enum("precision", "f32", list(precision.COMPUTE_DTYPES), "Of both.")
PEAK = flags.DEFINE_float("peak_tflops", None, "bf16 peak of one device; known for common ones")
REMAT = flags.DEFINE_bool("remat", False, "Compare with recomputed activations, not PyTorch.")
STEPS = flags.DEFINE_integer("steps", 5, "Timed steps of each, after two for warming up.")
LEARNING_RATE = 1e-3


def inputs_of(module: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if hasattr(module, "vocab_size"):
        shape = (BATCH.value, SIZE.value)
        tokens = rng.integers(1, module.vocab_size, shape, np.int32)
        return [tokens, np.ones(shape, np.int32)]
    return [rng.random((BATCH.value, SIZE.value, SIZE.value, 3), np.float32)]


class Steps(NamedTuple):
    """What there is to time of a model.

    Attributes:
      runs: 'forward' and 'train'.
      flops: of each of these.
      kept: bytes that 'train' keeps from its forward for its backward pass, weights included.
      temporary: bytes of temporary buffers of 'train'.
    """

    runs: dict[str, Callable[[], None]]
    flops: dict[str, float]
    kept: int
    temporary: int


def ours(module: Any, inputs: list[np.ndarray]) -> Steps:
    """Steps of our module."""
    x = [jnp.asarray(i) for i in inputs]
    variables = jax.jit(lambda *x: module.init(jax.random.key(0), *x, train=False))(*x)
    rest = {k: v for k, v in variables.items() if k != "params"}
    forward = jax.jit(lambda v, *x: module.apply(v, *x, train=False)[0])

    def loss(params: Any, rest: Any, *x: jax.Array) -> tuple[jax.Array, Any]:
        out, mutated = module.apply({"params": params, **rest}, *x, train=True, mutable=list(rest))
        return jnp.mean(jnp.square(out[0])), mutated

    @partial(jax.jit, donate_argnums=(0, 1))  # as the loop does, and PyTorch updates in place
    def step(params: Any, rest: Any, *x: jax.Array) -> tuple[Any, Any]:
        grads, rest = jax.grad(loss, has_aux=True)(params, rest, *x)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), rest

    state = jax.tree.map(jnp.copy, [variables["params"], rest])
    compiled = step.lower(*state, *x).compile()

    def train() -> None:
        state[:] = jax.block_until_ready(compiled(*state, *x))

    runs = {"forward": lambda: jax.block_until_ready(forward(variables, *x)), "train": train}
    forward_flops = forward.lower(variables, *x).cost_analysis()["flops"]
    flops = {"forward": forward_flops, "train": 3 * forward_flops}
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, rest, *x)[0], p)[1], state[0])
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    return Steps(runs, flops, kept, compiled.memory_analysis().temp_size_in_bytes)


def torch_twin(section: dict, module: Any) -> Any:
    """The same encoder: of transformers, which has no DenseNet, or written here."""
    if section["name"] == "densenet":
        import torch_models  # beside this file

        return torch_models.DenseNet(*densenet.VARIANTS[module.depth])
    import transformers

    if section["name"] == "resnet":  # SimCLR's pads other sides, at the same cost
        module = module.clone(stem="torchvision")
    family = weights.family_of(section, "huggingface")
    shapes = {k: v.shape for k, v in weights.abstract_leaves(module, SIZE.value, 3).items()}
    described = family.describe(module, "huggingface", shapes)
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    kind = described.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **described, **dropouts)
    return getattr(transformers, described["architectures"][0])(config)


def theirs(section: dict, module: Any, inputs: list[np.ndarray]) -> dict[str, Callable[[], None]]:
    """{'forward', 'train'} of the same encoder in PyTorch."""
    import torch

    net = torch_twin(section, module)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    net = net.to(device)
    half = PRECISION.value == "bf16"
    if inputs[0].ndim == 4:
        net = net.to(memory_format=torch.channels_last)
        x = [torch.from_numpy(inputs[0]).permute(0, 3, 1, 2).to(device)]
    else:  # tokens and their mask
        x = [torch.from_numpy(i).long().to(device) for i in inputs]
    call = torch.compile(net) if device == "cuda" else net
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)

    def features() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            out = call(*x)
        out = getattr(out, "last_hidden_state", out).float()
        return out[:, 0] if getattr(module, "pool", None) == "cls" else out

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        net.eval()
        with torch.no_grad():
            features()
        wait()

    def train() -> None:
        net.train()
        optimizer.zero_grad(set_to_none=True)
        features().square().mean().backward()
        optimizer.step()
        wait()

    return {"forward": forward, "train": train}


def beside_torch(
    name: str, section: dict, module: Any, inputs: list[np.ndarray], peak: float | None
) -> None:
    """Prints two lines of the table, with MFU if the device's peak is known."""
    mine, other = ours(module, inputs), theirs(section, module, inputs)
    for mode in ("forward", "train"):
        seconds = timing.time_in_turns({"a": mine.runs[mode], "b": other[mode]}, STEPS.value)
        a, b = (statistics.median(seconds[k]) for k in "ab")
        fastest = min(seconds["b"]) / min(seconds["a"])
        times = f"{a * 1e3:12.1f}{b * 1e3:12.1f}"
        rate = mine.flops[mode] / a
        rates = f"{rate / 1e9:12.1f}" + (f"{rate / peak:12.1%}" if peak else "")
        print(f"{name:20}{mode:10}{times}{b / a:11.2f}x{fastest:11.2f}x{rates}", flush=True)


def beside_remat(name: str, module: Any, inputs: list[np.ndarray]) -> None:
    """Prints a line of the table for the model as it is and for each way of recomputing."""
    ways = {"plain": module, "remat": module.clone(remat=True)}
    if hasattr(module, "scan"):
        ways["scan"] = module.clone(scan=True)
        ways["scan, remat"] = module.clone(scan=True, remat=True)
    steps = {way: ours(m, inputs) for way, m in ways.items()}
    runs = {way: step.runs["train"] for way, step in steps.items()}
    seconds = timing.time_in_turns(runs, STEPS.value)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    for way, step in steps.items():
        memory = f"{step.kept / 2**20:12.0f}{step.temporary / 2**20:12.0f}"
        ratios = (median[way] / median["plain"], min(seconds[way]) / min(seconds["plain"]))
        print(f"{name:20}{way:12}{memory}" + "".join(f"{r:11.2f}x" for r in ratios), flush=True)


def main(argv: list[str]) -> None:
    """Prints a table, a line for each model and mode."""
    del argv
    named, device = named_models(), jax.devices()[0]
    peak = timing.peak_flops(device, PEAK.value)
    print(
        f"{BATCH.value} inputs of size {SIZE.value} a step, {PRECISION.value}, jax "
        f"{jax.__version__} on {timing.device_name(device)}; medians of {STEPS.value}, in turns"
    )
    columns = ["bigmed, ms", "PyTorch, ms", "medians", "fastest", "GFLOP/s"]
    if REMAT.value:
        columns = ["kept, MiB", "plan, MiB", "medians", "fastest"]
    elif peak:
        columns.append("MFU")
    header = "".join(f"{column:>12}" for column in columns)
    print(f"{'':20}{' ' * (12 if REMAT.value else 10)}{header}")
    for name in MODELS.value:
        if name not in named:
            raise UserError(f"--models: '{name}': {did_you_mean(name, named)}")
        module = build(named[name], precision.compute_dtype(PRECISION.value))
        inputs = inputs_of(module)
        if REMAT.value:
            beside_remat(name, module, inputs)
        else:
            beside_torch(name, named[name], module, inputs, peak)


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
