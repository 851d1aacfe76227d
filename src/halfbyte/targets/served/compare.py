"""Which twin an engine's answers are those of: what it really computed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.core.errors import HalfbyteError

# Nats per token. One kernel says the same twice; rounding activations to 8 bits moves log-probabilities by far more.
SAME = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What a folder ran as.

    Attributes:
        distances: twin -> mean absolute difference of log-probabilities, nats per token.
        alike: twins that answer as the folder does.
        text: one sentence.
    """

    distances: dict[str, float]
    alike: tuple[str, ...]
    text: str


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two lists of log-probabilities of the same tokens, nats per token.

    Raises:
        HalfbyteError: they are not of the same tokens.
    """
    if len(one) != len(other) or not one:
        raise HalfbyteError(
            "log-probabilities of other tokens",
            where="comparison",
            expected=len(one),
            got=len(other),
            fix="give both folders one prompt",
        )
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def ran_as(folder: Sequence[float], twins: Mapping[str, Sequence[float]], same: float = SAME) -> Verdict:
    """Compare a folder's log-probabilities with those of its twins (``w4a16``, ``w4a8``, ``w4a4``).

    Raises:
        HalfbyteError: the lists are not of the same tokens.
    """
    distances = {name: distance(folder, answers) for name, answers in twins.items()}
    alike = tuple(name for name, value in distances.items() if value <= same)
    if len(alike) == len(twins):
        text = "activation bits change nothing here: the engine computes the folder and every twin alike"
    elif alike:
        text = f"the whole folder was computed as {' and '.join(alike)}, whatever its groups say"
    else:
        nearest = min(distances, key=lambda name: distances[name])
        text = f"as none of the twins, nearest to {nearest}: layers were computed with different activation bits"
    return Verdict(distances, alike, text)
