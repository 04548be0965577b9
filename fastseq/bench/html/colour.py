"""The heat map's colours: orange for slower, blue for faster, nothing at 1x, on a log scale.

Orange and blue stay apart for all common kinds of colour blindness. The steps are few, so that they
are classes of the style sheet: the same cell then follows the light and the dark scheme.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# The scale ends at 8x faster and 8x slower; what lies beyond has the last colour.
LIMIT = 8.0
STEPS = 12
# As good as equal: no colour.
_EQUAL = 1.02

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scheme:
    """Ends and middle of the scale on one background."""

    slower: Colour
    middle: Colour
    faster: Colour


LIGHT = Scheme(slower=(166, 54, 3), middle=(243, 242, 238), faster=(8, 81, 156))
DARK = Scheme(slower=(255, 150, 70), middle=(38, 43, 51), faster=(96, 174, 255))


def step(ratio: float) -> int:
    """The scale's step for a speed-up: 0 about 1x, ``STEPS`` at ``LIMIT``, negative when slower."""
    position = math.log(ratio) / math.log(LIMIT)
    number = min(STEPS, max(1, round(abs(position) * STEPS)))
    return 0 if _EQUAL > ratio > 1 / _EQUAL else int(math.copysign(number, position))


def luminance(colour: Colour) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = []
    for channel in colour:
        value = channel / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: Colour, second: Colour) -> float:
    """Contrast ratio of two colours (WCAG 2): 1 to 21."""
    lights = sorted((luminance(first), luminance(second)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def background(number: int, scheme: Scheme) -> Colour:
    """The colour of a step."""
    end = scheme.faster if number > 0 else scheme.slower
    # The first steps differ more than the last: most ratios lie near 1.
    share = (abs(number) / STEPS) ** 0.75
    red, green, blue = (round(m + (e - m) * share) for m, e in zip(scheme.middle, end, strict=True))
    return red, green, blue


def ink(number: int, scheme: Scheme) -> Colour:
    """Black or white, whichever reads better on a step."""
    behind = background(number, scheme)
    return max(((0, 0, 0), (255, 255, 255)), key=lambda colour: contrast(colour, behind))


def css(colour: Colour) -> str:
    """A colour in a style sheet."""
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def rules(scheme: Scheme) -> str:
    """Style rules of all steps: ``.step-3`` is background and ink of step 3, ``.step--3`` of -3."""
    return "\n".join(
        f".step-{number}{{background:{css(background(number, scheme))};"
        f"color:{css(ink(number, scheme))}}}"
        for number in range(-STEPS, STEPS + 1)
    )
