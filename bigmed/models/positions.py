"""Codes of where a patch lies in an image: fixed ones, and learned ones for another grid."""

import numpy as np

from bigmed.errors import UserError


def sincos2d(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed position codes [height * width, dim] float32 (arXiv 2205.01580).

    The four quarters of a code are the sine and cosine of x and the sine and cosine of y, at
    frequencies from 1 down to 1/10000.
    """
    y, x = np.mgrid[:height, :width]
    frequencies = 1.0 / 10000 ** np.linspace(0, 1, dim // 4)
    angles_x, angles_y = (np.outer(p.ravel(), frequencies) for p in (x, y))
    parts = [np.sin(angles_x), np.cos(angles_x), np.sin(angles_y), np.cos(angles_y)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def resample_positions(
    codes: np.ndarray,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix: int,
    *,
    antialias: bool,
) -> np.ndarray:
    """Learned position codes for another resolution or patch size, by bicubic interpolation.

    As PyTorch's `interpolate(size=new_grid, mode='bicubic', align_corners=False)`, computed in
    float64. Its two forms differ, also where the grid grows:

      antialias=True   cubic with a = -0.5, widened where the grid shrinks, weights renormalised at
                       the border (timm; DINOv2 with registers)
      antialias=False  cubic with a = -0.75 over four neighbours, border repeated (DINOv2 without
                       registers, and the other models of transformers)

    Args:
      codes: [1, prefix + h * w, D] of any float dtype, row by row.
      old_grid: (h, w).
      new_grid: the wanted height and width, in patches.
      prefix: how many codes before those of the patches are kept as they are (of class tokens).
      antialias: see above.

    Returns:
      [1, prefix + new height * new width, D] of the codes' dtype; the codes themselves if the grid
      stays.

    Raises:
      UserError: the number of codes is not that of `prefix` and `old_grid`.
    """
    h, w = old_grid
    if codes.ndim != 3 or codes.shape[:2] != (1, prefix + h * w):
        raise UserError(
            f"position codes {tuple(codes.shape)} are not those of {prefix} tokens and "
            f"{h}x{w} patches, (1, {prefix + h * w}, D)"
        )
    if tuple(old_grid) == tuple(new_grid):
        return codes
    grid = codes[0, prefix:].reshape(h, w, -1).astype(np.float64)
    # r, c: new row and column
    rows, columns = (_weights(*sizes, antialias) for sizes in zip(old_grid, new_grid, strict=True))
    grid = np.einsum("rh,cw,hwd->rcd", rows, columns, grid, optimize=True)
    patches = grid.reshape(1, -1, codes.shape[2]).astype(codes.dtype)
    return np.concatenate([codes[:, :prefix], patches], axis=1)


def _weights(old: int, new: int, antialias: bool) -> np.ndarray:
    """[new, old]: how much of every old position is in every new one, along one axis."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    if antialias:
        weights = _cubic((np.arange(old)[None] - centres) / max(scale, 1.0), -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    taps = np.floor(centres) + np.arange(-1, 3)[None]
    weights = np.zeros((new, old))
    new_positions = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    old_positions = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(weights, (new_positions, old_positions), _cubic(taps - centres, -0.75))
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981), 0 beyond a distance of 2."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
