"""A picture's perceptual hash: near-identical pictures differ in few of its 256 bits.

The DCT hash of Zauner (2010, "Implementation and benchmarking of perceptual image hash functions")
at the size that Facebook's PDQ (2019) gives it: 64 x 64 pixels, 16 x 16 frequencies. On real posts
and product shots, 16 of 256 bits tell a picture saved again or resized from another of the same
kind, which hashes of 64 bits do not: at equal recall they join hundreds of different products.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from mmray.config import ImagePreprocess
from mmray.errors import BadRow
from mmray.preprocess.image import decode_image

HASH_BYTES = 32
SIDE, FREQUENCIES = 64, 16
SMALL = ImagePreprocess(size=SIDE)
LUMA = (299, 587, 114)  # thousandths of red, green and blue: ITU-R BT.601
SCALE = 1 << 10  # of the cosines, rounded to whole numbers

#: A coefficient of less than one grey level is what JPEG and rounding left; where fewer than half
#: stand out (one colour, a ramp), the bits say nothing and the picture has no hash.
LEAST = 1000 * SCALE * SCALE * SIDE / 2
ENOUGH = FREQUENCIES * FREQUENCIES // 2


def perceptual_hash(data: bytes) -> bytes | None:
    """The hash of encoded image bytes, 32 bytes; None for what is no picture or has no structure.

    Bit i is set where coefficient i of the grey picture's DCT, the lowest frequency of each
    direction left out, is above the median. Computed in whole numbers: the same everywhere.
    """
    try:
        pixels_chw = decode_image(data, SMALL)
    except BadRow:
        return None
    grey = np.tensordot(np.array(LUMA, dtype=np.float64), pixels_chw, 1)
    cosines = _cosines()
    # In float64, for its fast product: every sum is a whole number below 2**53, and so exact.
    coefficients = cosines @ grey @ cosines.T
    if (np.abs(coefficients) >= LEAST).sum() < ENOUGH:
        return None
    return np.packbits(coefficients > np.median(coefficients)).tobytes()


@functools.cache
def _cosines() -> npt.NDArray[np.float64]:
    """float64 [FREQUENCIES, SIDE]: rows 1 to 16 of the DCT-II, times ``SCALE``, whole numbers."""
    at, frequency = np.arange(SIDE), np.arange(1, FREQUENCIES + 1)[:, None]
    angles = np.pi * (2 * at + 1) * frequency / (2 * SIDE)
    cosines: npt.NDArray[np.float64] = np.rint(SCALE * np.cos(angles))
    return cosines
