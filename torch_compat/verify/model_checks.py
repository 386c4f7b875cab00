"""What the comparison of a model measured, and the limits that each measure must keep."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A number with limits that it may reach. NaN is never within them."""

    name: str
    value: float
    at_least: float = -math.inf
    at_most: float = math.inf

    @classmethod
    def count(cls, name: str, value: int, total: int) -> "Measure":
        """A number of things that must be all of them."""
        return cls(name, value, total, total)

    @property
    def is_within(self) -> bool:
        """Whether the number keeps its limits."""
        return self.at_least <= self.value <= self.at_most

    def describe(self) -> str:
        """The limit where it is kept, so that two runs read alike; else the number, too."""
        if self.at_least == self.at_most:
            return f"{self.value} of {self.at_most} {self.name}"
        limit = f"at least {self.at_least:g}" if self.at_most == math.inf else f"at most {self.at_most:g}"
        return f"{self.name} {limit}" if self.is_within else f"{self.name} {self.value:g}, NOT {limit}"


@dataclass(frozen=True)
class ModelCheck:
    """How a model with jaxmask's masks, or of jaxmask, compares with PyTorch's."""

    model: str
    measures: tuple[Measure, ...]
    # Such as ties between two tokens.
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether every measure keeps its limits."""
        return all(measure.is_within for measure in self.measures)

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.model}: {'; '.join([*(measure.describe() for measure in self.measures), *self.notes])}"

    def as_json(self) -> dict[str, Any]:
        """The check for a report, in which infinite numbers and NaN are text."""
        measures = [
            {name: value if isinstance(value, str) or math.isfinite(value) else str(value) for name, value in fields}
            for fields in (asdict(measure).items() for measure in self.measures)
        ]
        return {"model": self.model, "measures": measures, "notes": self.notes}
