"""Orthogonal matrices with entries of equal size, for any width, and their fast product with a tensor.

A Hadamard matrix spreads every channel evenly over all others. Orders come from Sylvester's doubling and Paley's two
constructions (Paley 1933, J. Math. Phys. 12): q + 1 for a prime q ≡ 3 (mod 4), 2 (q + 1) for a prime q ≡ 1 (mod 4).
A width is split as ``odd part with a few twos`` × ``powers of two`` (576 = 36·16, 4864 = 76·64, 18944 = 148·128), and
the product is applied factor by factor, so that n channels cost n · (sum of the factors) instead of n².
"""

from __future__ import annotations

import hashlib
import math
from functools import cache, reduce

import numpy as np
import torch

from halfbyte.core.precision import products

LARGEST_FACTOR = 64  # of the powers of two: larger ones are split further
LARGEST_PALEY = 1024


def hadamard_matrix(order: int) -> torch.Tensor | None:
    """A matrix of ±1, fp64 ``[order, order]``, with ``H Hᵀ = order · I``; None if neither construction gives one."""
    if order & (order - 1) == 0:
        double = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        return reduce(torch.kron, [double] * (order.bit_length() - 1), torch.ones(1, 1, dtype=torch.float64))
    if order % 4 == 0 and _is_prime(order - 1):  # q = order - 1 ≡ 3 (mod 4)
        skew = _bordered(order - 1, lower=-1.0)
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        conference = _bordered(order // 2 - 1, lower=1.0)
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        eye = torch.eye(order // 2, dtype=torch.float64)
        return torch.kron(conference, plus.double()) + torch.kron(eye, minus.double())
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _bordered(q: int, *, lower: float) -> torch.Tensor:
    """Jacobsthal's matrix of the prime ``q`` (Legendre symbols of i − j) with a border of ones, ``[q + 1, q + 1]``."""
    squares = {value * value % q for value in range(1, q)}
    symbols = torch.tensor([0.0, *(1.0 if value in squares else -1.0 for value in range(1, q))], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = lower
    matrix[1:, 1:] = symbols[(index.unsqueeze(1) - index) % q]
    return matrix


@cache
def factors(width: int) -> tuple[torch.Tensor, ...]:
    """Small orthogonal fp32 matrices whose Kronecker product is the rotation of ``width`` channels.

    All are Hadamard matrices divided by the root of their order, as long as the odd part of ``width``, times one to
    eight, has a Paley matrix; otherwise the odd part is a cosine transform (entries up to √2 larger).
    """
    odd, power = width, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    found = []
    if odd > 1:
        small = _smallest_paley(odd, power)
        power //= small.shape[0] // odd
        found.append(small)
    while power > 1:
        part = min(power, LARGEST_FACTOR)
        if LARGEST_FACTOR < power < LARGEST_FACTOR**2:
            part = 2 ** ((power.bit_length()) // 2)  # two factors of about the same size
        matrix = hadamard_matrix(part)
        assert matrix is not None
        found.append((matrix / math.sqrt(part)).float())
        power //= part
    return tuple(found) or (torch.ones(1, 1),)


def _smallest_paley(odd: int, power: int) -> torch.Tensor:
    for times in (1, 2, 4, 8):
        order = odd * times
        if power % times == 0 and order <= LARGEST_PALEY:
            matrix = hadamard_matrix(order)
            if matrix is not None:
                return (matrix / math.sqrt(order)).float()
    row, column = torch.arange(odd, dtype=torch.float64).unsqueeze(1), torch.arange(odd, dtype=torch.float64)
    cosines = torch.cos(math.pi * row * (2 * column + 1) / (2 * odd)) * math.sqrt(2 / odd)
    cosines[0] /= math.sqrt(2)
    return cosines.float()


@cache
def signs(width: int) -> torch.Tensor:
    """Fixed ±1 per channel, fp32 ``[width]``: without them a constant offset would end up in one channel."""
    data = hashlib.shake_128(f"halfbyte rotation of {width}".encode()).digest((width + 7) // 8)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))[:width]
    return torch.from_numpy(1.0 - 2.0 * bits).float()


@cache
def _on(width: int, device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    return signs(width).to(device), tuple(factor.to(device) for factor in factors(width))


@products(exact=True)  # rounding 1/√n would scale everything
def rotate(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., width]`` times the rotation of that width: ``Q x`` for every row, fp32."""
    width = x.shape[-1]
    sign, parts = _on(width, x.device)
    rows = x.float().reshape(-1, width) * sign
    for part in parts:  # multiply the first axis, move it last; after all factors the axes are in order again
        rows = rows.view(-1, part.shape[0], width // part.shape[0]).transpose(1, 2) @ part.T
        rows = rows.reshape(-1, width)
    return rows.view(x.shape)


def largest_block(width: int) -> int:
    """The largest power of two that divides ``width``."""
    return width & -width


@cache
def _sylvester(block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = hadamard_matrix(block)
    assert matrix is not None
    return matrix.float().to(device), torch.tensor(math.sqrt(block), device=device)


@products(exact=True)
def rotate_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Every ``block`` channels of ``x`` ``[..., width]`` times Sylvester's matrix over √block, fp32; its own inverse.

    One dense product and one division: what compressed-tensors computes for a transform of type ``hadamard``, to the
    last bit (its ``transform/factory/hadamard.py``), because at 4 bits the last bit decides codes.
    """
    matrix, root = _sylvester(block, x.device)
    return (x.float().unflatten(-1, (-1, block)) @ matrix).flatten(-2) / root


@products(exact=True)
def rotate_back(x: torch.Tensor) -> torch.Tensor:
    """What :func:`rotate` made ``x`` of: ``Qᵀ x`` for every row, fp32."""
    width = x.shape[-1]
    sign, parts = _on(width, x.device)
    rows = x.float().reshape(-1, width)
    for part in parts:
        rows = rows.view(-1, part.shape[0], width // part.shape[0]).transpose(1, 2) @ part
        rows = rows.reshape(-1, width)
    return (rows * sign).view(x.shape)


def rotation_matrix(width: int) -> torch.Tensor:
    """The same rotation as a matrix Q, fp64 ``[width, width]``."""
    kron = reduce(torch.kron, [part.double() for part in factors(width)])
    return kron * signs(width).double()
