"""Test set-up: eight fake CPU devices, strict rank promotion, and where the real data lies."""

import contextlib
import os
import pathlib

# Before jax is imported. Programs here are compiled far longer than they run.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Linux lets a process map 65,530 regions, and every compiled program takes several."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def on_one_device(tmp_path_factory):
    """A context in which runs use one device, and find on disk what was compiled for it before.

    Such programs compile in half the time. Those for several devices may not be kept, see
    `bigmed.main`.
    """
    from bigmed import sharding

    programs = str(tmp_path_factory.mktemp("programs"))
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "make_mesh", lambda *args: mesh)
            jax.config.update("jax_compilation_cache_dir", programs)
            compilation_cache.reset_cache()
            try:
                yield
            finally:
                jax.config.update("jax_compilation_cache_dir", None)
                compilation_cache.reset_cache()

    return context


@pytest.fixture
def one_device(on_one_device):
    """`on_one_device` for a test."""
    with on_one_device():
        yield


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of small real data sets; tests that need it skip where it is absent."""
    folder = pathlib.Path(os.environ.get("BIGMED_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set BIGMED_SHARED_DATA)")
    return folder
