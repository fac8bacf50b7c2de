"""The precision policy: which dtype the arithmetic of the backbone runs in.

Parameters, optimiser state, batch statistics, logits and losses are float32 under every policy.
bfloat16 has float32's exponent range, so there is no loss scaling; float16 is not supported.
"""

import jax.numpy as jnp

from bigmed.errors import UserError, did_you_mean

COMPUTE_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


def compute_dtype(precision: str) -> jnp.dtype:
    """The dtype that modules get as `dtype=` for `config.precision`, 'f32' or 'bf16'.

    Raises:
      UserError: any other name.
    """
    if precision not in COMPUTE_DTYPES:
        raise UserError(
            f"config.precision='{precision}': {did_you_mean(precision, COMPUTE_DTYPES)}"
        )
    return jnp.dtype(COMPUTE_DTYPES[precision])
