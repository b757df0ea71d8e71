"""A model as a plan counts it: where it is, its shape, and how its weights are stored."""

from __future__ import annotations

from dataclasses import dataclass

from opdkit.models.quantize import BYTES
from opdkit.models.shapes import Shape

WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes of a number
HERE, ENGINE, ELSEWHERE = "in this process", "in a vLLM engine on this device", "elsewhere"


@dataclass(frozen=True)
class Held:
    """A model that a run reads."""

    role: str  # as the objective calls it; one of several teachers behind a dot
    name: str
    where: str
    shape: Shape | None = None  # None for one elsewhere
    dtype: str = ""  # of its weights
    own: bool = True  # False: its weights are those of a model named before
    quantize: str | None = None
    offload: bool = False  # it waits on the CPU, its head apart
    share: float = 1.0  # of the rollouts that it scores
    engine: float = 0.0  # share of the device that its engine takes

    @property
    def kind(self) -> str:
        """The objective's name for it."""
        return self.role.partition(".")[0]

    @property
    def shaped(self) -> Shape:
        assert self.shape is not None, f"{self.role} is elsewhere"
        return self.shape

    @property
    def weights(self) -> int:
        """Bytes of its weights in this process."""
        return (
            stored(self.shaped, self.dtype, self.quantize) if self.where == HERE and self.own else 0
        )

    @property
    def numbers(self) -> str:
        """How its weights are stored, in words."""
        return self.dtype if self.quantize is None else f"{self.quantize} and {self.dtype}"

    def product_width(self, products: str) -> int:
        """Bytes of a number in its matrix products, in a run whose products are of this dtype."""
        return min(WIDTH[self.dtype], WIDTH[products])

    def cached_token(self, products: str) -> int:
        """Bytes of one token in its key-value cache in this process, in the products' type."""
        shape = self.shaped
        return 2 * shape.layers * shape.keys * self.product_width(products)


def stored(shape: Shape, dtype: str, quantize: str | None) -> int:
    """Bytes of a model's weights; quantised are the linear layers but the head."""
    if quantize is None:
        return shape.parameters * WIDTH[dtype]
    inner = sum(x.inputs * x.outputs for x in shape.linears)
    scales = 4 * sum(x.outputs for x in shape.linears) if quantize == "8bit" else 0
    return round(inner * BYTES[quantize]) + scales + (shape.parameters - inner) * WIDTH[dtype]
