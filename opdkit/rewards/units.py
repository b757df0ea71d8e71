"""Units of measure: which of them differ, and by what."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

# dimension: names of one unit, joined by |, and what it is of the first
_TABLE = {
    "length": {
        "m|meter|metre": "1", "mm|millimeter|millimetre": "1/1000",
        "cm|centimeter|centimetre": "1/100", "dm|decimeter|decimetre": "1/10",
        "km|kilometer|kilometre": "1000", "in|inch|inches": "0.0254", "ft|foot|feet": "0.3048",
        "yd|yds|yard": "0.9144", "mi|mile": "1609.344",
    },
    "mass": {
        "g|gram": "1", "mg|milligram": "1/1000", "kg|kgs|kilogram": "1000",
        "ton|tonne": "1000000", "lb|lbs": "453.59237", "oz|ounce": "28.349523125",
    },
    "volume": {"l|liter|litre": "1", "ml|milliliter|millilitre": "1/1000", "gallon": "3.785411784"},
    "time": {
        "s|sec|secs|second": "1", "ms|millisecond": "1/1000", "min|mins|minute": "60",
        "h|hr|hrs|hour": "3600", "day": "86400", "week": "604800",
    },
    "calendar": {"month": "1", "yr|yrs|year": "12", "decade": "120", "century|centuries": "1200"},
    "dollar": {"dollar|usd|buck": "1", "cent": "1/100"},
    "euro": {"euro|eur": "1"},
    "sterling": {"gbp": "1"},
    "rupee": {"rupee|inr": "1"},
    "yen": {"yen|jpy": "1"},
    "morning": {"am": "1"},
    "afternoon": {"pm": "1"},
    "celsius": {"celsius": "1"},
    "fahrenheit": {"fahrenheit": "1"},
    "angle": {"degree": "1"},
    "radian": {"radian|rad": "1"},
}  # fmt: skip
UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, names in _TABLE.items()
    for several, factor in names.items()
    for name in several.split("|")
}
COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "sqft": "ft^2", "cc": "cm^3"}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


@dataclass(frozen=True)
class Unit:
    """km/h: ((length, 1), (time, -1)), and 1000/3600 of m/s."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


def unit(text: str) -> Unit | None:
    """What a text of words says as a unit, None where it says more than units, or something else:
    apples.
    """
    text = COMPOUND.get(text.strip().lower(), text.strip().lower())
    over = re.split(r"\s*/\s*|\s+per\s+", text)
    powers: Counter[str] = Counter()
    factor = Fraction(1)
    for part, sign in zip(over, [1] + [-1] * (len(over) - 1), strict=True):
        words = re.findall(r"[a-z]+", part)
        power = next((POWERS[word] for word in words if word in POWERS), 1)
        if found := re.search(r"[a-z]\s*\^?\{?([23])\}?$", part):
            power = int(found[1])
        names = [word for word in words if word not in POWERS]
        if len(names) == 2 and names[0] in ("degree", "degrees"):
            names = names[1:]
        if len(names) != 1 or (known := named(names[0])) is None:
            return None
        powers[known[0]] += sign * power
        factor *= known[1] ** (sign * power)
    return Unit(tuple(sorted((d, p) for d, p in powers.items() if p)), factor)


def named(word: str) -> tuple[str, Fraction] | None:
    """The dimension and factor of a word; plurals are known too."""
    return UNITS.get(word) or (UNITS.get(word[:-1]) if word.endswith("s") else None)
