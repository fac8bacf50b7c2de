"""Contrastive losses at once against in tiles: peak memory on eight devices, and time on one.

    python tools/bench_loss.py                 # memory of fake CPU devices, time of this machine's
    python tools/bench_loss.py --nomemory      # time alone, e.g. on a GPU

Memory is the temporary memory of the compiled loss and gradient, per device, in MiB; nothing of
that size is run. Times are medians in turns, and their ratio.
"""

import os
import statistics

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import timing  # noqa: E402  # beside this file
from absl import app, flags  # noqa: E402

from bigmed import losses, sharding  # noqa: E402

MEMORY = flags.DEFINE_bool("memory", True, "whether to compile for eight CPU devices")
BATCHES = flags.DEFINE_list("batches", ["1024", "2048", "4096"], "of the timings, on one device")
DIM = flags.DEFINE_integer("dim", 128, "of the embeddings, in the timings")
TILES = flags.DEFINE_list("tiles", ["256", "512", "1024"], "to time")
STEPS = flags.DEFINE_integer("steps", 7, "timed steps of each")
LOSSES = {
    "ntxent": lambda v, u, tile: losses.ntxent(v, u, temperature=0.1, tile=tile).loss,
    "infonce": lambda v, u, tile: losses.infonce(v, u, scale=10.0, tile=tile).loss,
    "sigmoid": lambda v, u, tile: losses.sigmoid(v, u, scale=10.0, bias=-10.0, tile=tile).loss,
}


def value_and_grad(name, tile):
    return jax.jit(jax.value_and_grad(lambda v, u: LOSSES[name](v, u, tile), (0, 1)))


def memory(name, batch, dim, tile):
    """MiB of temporary memory per device, of eight."""
    mesh = sharding.make_mesh({"data": 8}, jax.devices("cpu")[:8])
    shape = jax.ShapeDtypeStruct((batch, dim), jnp.float32, sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = value_and_grad(name, tile).lower(shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main(argv):
    del argv
    if MEMORY.value:
        print("MiB per device of 8     batch    dim  at once  tiled")
        for name in LOSSES:
            for dim in (128, 512):
                for batch in (4096, 16384, 65536):
                    found = [memory(name, batch, dim, tile) for tile in (0, losses.TILE)]
                    shown = f"{found[0]:8.1f} {found[1]:6.1f}"
                    print(f"{name:20} {batch:8} {dim:6} {shown}", flush=True)
    device = jax.devices()[0]
    print(f"seconds on one device ({timing.device_name(device)}), dim {DIM.value}")
    for name in LOSSES:
        for batch in map(int, BATCHES.value):
            keys = jax.random.split(jax.random.key(0))
            v, u = (jax.device_put(jax.random.normal(k, (batch, DIM.value)), device) for k in keys)
            runs = {
                f"tile {tile}": value_and_grad(name, tile) for tile in (0, *map(int, TILES.value))
            }
            steps = {
                key: lambda run=run, v=v, u=u: jax.block_until_ready(run(v, u))
                for key, run in runs.items()
            }
            taken = timing.time_in_turns(steps, STEPS.value)
            seconds = {key: statistics.median(times) for key, times in taken.items()}
            dense = seconds["tile 0"]
            shown = ", ".join(
                f"{key} {value:.3f} ({value / dense:.2f}x)" for key, value in seconds.items()
            )
            print(f"{name:10} {batch:6}: {shown}", flush=True)


if __name__ == "__main__":
    app.run(main)
