"""What the tests against PyTorch share: variables from a foreign model, and comparison."""

import jax
import jax.numpy as jnp
import numpy as np

from bigmed import tree
from bigmed.convert import mapping


def abstract_leaves(model, *inputs):
    """{path: ShapeDtypeStruct} of the model's variables; nothing is computed."""
    return tree.flatten(
        jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, train=False), *inputs)
    )


def image_spec(size, channels=3):
    return jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)


def random_leaves(model, size, channels=3):
    """{path: array} that makes every part of a model matter; activations stay of order one."""
    rng, leaves = np.random.default_rng(0), {}
    for name, leaf in abstract_leaves(model, image_spec(size, channels)).items():
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        last = name.rpartition("/")[2]
        if last == "kernel":
            leaves[name] = noise * max(leaf.size // leaf.shape[-1], 1) ** -0.5
        elif last == "var":
            leaves[name] = 1 + 0.3 * np.abs(noise)
        elif last == "scale":
            leaves[name] = (1 + 0.2 * noise) * (0.3 if name.endswith("norm3/scale") else 1)
        else:
            leaves[name] = 0.1 * noise
    return leaves


def randomise(module, seed=0):
    """Fills a torch module with numbers that make every part of it matter; returns it in eval."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.3 * noise.abs())
        elif tensor.ndim > 1:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)
        elif name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)  # norms
        else:
            tensor.copy_(0.1 * noise)
    return module.eval()


def numpy_state(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def load(family, model, naming, state, *inputs):
    """(variables, left over, fresh) of `model` from a foreign state; checks the table on the way.

    The table must name every leaf once, and reading it back must give the same bits.
    """
    entries = family.entries(model, naming)
    shapes = abstract_leaves(model, *inputs)
    ours = [entry.ours for entry in entries]
    assert len(set(ours)) == len(ours) and set(ours) == set(shapes), set(ours) ^ set(shapes)
    leaves, left_over, fresh = mapping.to_ours(
        state, entries, {path: leaf.shape for path, leaf in shapes.items()}
    )
    if not fresh:
        for name, tensor in mapping.to_theirs(leaves, entries).items():
            np.testing.assert_array_equal(tensor, state[name], err_msg=name)
    return tree.unflatten(leaves), left_over, fresh
