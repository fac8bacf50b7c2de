"""Times a full SimCLR train step beside an equal PyTorch step, in one run.

    python tools/bench_train.py --model=resnet50 --size=128 --batch=16
    python tools/bench_train.py --model=vit-s16 --size=224 --batch=4
    python tools/bench_train.py --model=vit-b16 --size=224 --batch=512 --precision=bf16 --notorch

A step is: the encoder and a two-layer projection head on both views of `batch` images, NT-Xent,
backward pass, SGD with momentum and weight decay. Augmentation is left out of both; its time on the
JAX side is measured apart. The two take turns, so that a change of the machine's load meets both.
PyTorch (`pip install -e '.[bench]'`) runs on the CPU, float32, channels-last, on all cores, without
torch.compile. On an accelerator the tool reports images/s and MFU: 3 x the FLOPs of XLA's count of
the forward pass (of the matrix products and convolutions, the encoder and head), per second, over
the device's bf16 peak.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from absl import app, flags

from bigmed.host_memory import keep_freed_memory

keep_freed_memory()  # before jax starts its threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import timing  # noqa: E402  # beside this file

from bigmed import augment, losses, precision  # noqa: E402
from bigmed.errors import UserError  # noqa: E402
from bigmed.models import resnet, vit  # noqa: E402
from bigmed.models.heads import ProjectionHead  # noqa: E402

MODELS = {
    "resnet18": lambda dtype: resnet.Model(18, dtype=dtype),
    "resnet50": lambda dtype: resnet.Model(50, dtype=dtype),
    "vit-s16": lambda dtype: vit.Model("S/16", dtype=dtype),
    "vit-b16": lambda dtype: vit.Model("B/16", dtype=dtype),
}
MODEL = flags.DEFINE_enum("model", "resnet50", list(MODELS), "the encoder")
SIZE = flags.DEFINE_integer("size", 128, "of the images")
BATCH = flags.DEFINE_integer("batch", 16, "images a step; each gives two views")
PRECISION = flags.DEFINE_enum("precision", "f32", list(precision.COMPUTE_DTYPES), "of JAX's side")
STEPS = flags.DEFINE_integer("steps", 7, "timed steps of each, after two for warming up")
TORCH = flags.DEFINE_bool("torch", True, "time PyTorch too")
PEAK = flags.DEFINE_float("peak_tflops", None, "bf16 peak of one device; known for common ones")
RECIPE = flags.DEFINE_string("recipe", "natural", "augmentation recipe to time")

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, TEMPERATURE = 0.01, 0.9, 1e-4, 0.1


def jax_step(name: str, images: np.ndarray, dtype: Any) -> tuple[Callable[[], None], float]:
    """A function that does one step on `images` [2B, S, S, 3], and the step's FLOPs."""
    encoder, head = MODELS[name](dtype), ProjectionHead(dtype=dtype)
    tx = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    )

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        keys = jax.random.split(key)
        variables = {
            "encoder": encoder.init(keys[0], jnp.zeros_like(images[:2]), train=False),
            "head": head.init(keys[1], jnp.zeros((2, encoder.feature_dim)), train=False),
        }
        params = {k: v["params"] for k, v in variables.items()}
        return params, {k: v.get("batch_stats", {}) for k, v in variables.items()}, tx.init(params)

    def embed(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        updated = {}
        for k, module in (("encoder", encoder), ("head", head)):
            variables = {"params": params[k], "batch_stats": stats[k]}
            (x, _), mutated = module.apply(variables, x, train=True, mutable=["batch_stats"])
            updated[k] = mutated.get("batch_stats", {})
        return x, updated

    def loss(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        z, stats = embed(params, stats, x)
        n = z.shape[0] // 2
        return losses.ntxent(z[:n], z[n:], temperature=TEMPERATURE).loss, stats

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        params, stats, opt_state = state
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    state = jax.jit(init)(jax.random.key(0))
    x = jnp.asarray(images)
    forward_flops = jax.jit(embed).lower(*state[:2], x).cost_analysis()["flops"]

    def run() -> None:
        nonlocal state
        state, value = step(state, x)
        value.block_until_ready()

    return run, 3 * forward_flops


def torch_step(name: str, images: np.ndarray) -> Callable[[], None]:
    """A function that does the same step in PyTorch, on the CPU."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is not installed: pip install -e '.[bench]', or pass --notorch"
        ) from None
    import torch_models  # beside this file
    from torch.nn import functional

    torch.manual_seed(0)
    model = torch_models.simclr(name, images.shape[1]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    x = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels-last as it lies

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        z = functional.normalize(model(x))
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        n = len(z) // 2
        target = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
        functional.cross_entropy(logits, target).backward()
        optimizer.step()

    return run


def augment_step(batch: int, size: int) -> Callable[[], None]:
    """A function that makes both views of a batch of uint8 images a little larger than `size`."""
    canvas = size * 8 // 7
    config = augment.from_config({"recipe": RECIPE.value, "size": size})
    images = jnp.full((batch, canvas, canvas, 3), 128, jnp.uint8)
    boxes = jnp.tile(jnp.asarray([[0, 0, canvas, canvas]], jnp.int32), (batch, 1))
    views = jax.jit(
        lambda key: [augment.augment(config, k, images, boxes) for k in jax.random.split(key)]
    )
    return lambda: jax.block_until_ready(views(jax.random.key(0)))


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    device = jax.devices()[0]
    shape = (2 * BATCH.value, SIZE.value, SIZE.value, 3)
    images = np.random.default_rng(0).random(shape, np.float32)
    step, flops = jax_step(MODEL.value, images, precision.compute_dtype(PRECISION.value))
    runs = {"bigmed": step}
    if TORCH.value:
        runs["PyTorch"] = torch_step(MODEL.value, images)
    runs["augmentation"] = augment_step(BATCH.value, SIZE.value)
    seconds = timing.time_in_turns(runs, STEPS.value)
    median = {name: statistics.median(values) for name, values in seconds.items()}

    print(
        f"{MODEL.value}, {SIZE.value} px, {BATCH.value} images = {2 * BATCH.value} views a step, "
        f"{PRECISION.value}, jax {jax.__version__} on {timing.device_name(device)}; medians of "
        f"{STEPS.value} steps, in turns; PyTorch without torch.compile"
    )
    print(f"{'':14}{'ms/step':>10}{'fastest':>10}{'images/s':>10}{'GFLOP/s':>10}")
    for name, value in median.items():
        rate = f"{flops / value / 1e9:10.1f}" if name != "augmentation" else f"{'':>10}"
        fastest = min(seconds[name]) * 1e3
        print(f"{name:14}{value * 1e3:10.1f}{fastest:10.1f}{BATCH.value / value:10.1f}{rate}")
    if "PyTorch" in median:
        by_median = median["PyTorch"] / median["bigmed"]
        by_fastest = min(seconds["PyTorch"]) / min(seconds["bigmed"])
        print(
            f"throughput against PyTorch: {by_median:.2f} x by the medians, "
            f"{by_fastest:.2f} x by the fastest steps"
        )
    print(f"augmentation, not in the step: {median['augmentation'] / median['bigmed']:.1%} of it")
    peak = timing.peak_flops(device, PEAK.value)
    if peak:
        print(f"MFU {flops / median['bigmed'] / peak:.1%} of {peak / 1e12:.0f} bf16 TFLOP/s")
    elif device.platform != "cpu":
        print(f"MFU unknown: pass --peak_tflops for a {device.device_kind}")


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
