"""Three answers that beat each other in a circle: mirror prox comes to rest at the equilibrium,
where mirror descent, which is the same without its half-step, goes round for ever.

python examples/nash_mirror_prox.py
python examples/nash_mirror_prox.py 0.2  # beta: held nearer to the reference, both arrive
"""

import sys
from itertools import islice

import torch

from opdkit.methods.nash_mp import mirror_prox

ANSWERS = ("rock", "paper", "well")
# how probably the answer of a row is preferred to that of a column
BEATS = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SHOWN = (0, 1, 2, 5, 10, 50, 100, 500)  # iterations


def distances(beta: float) -> dict[str, list[float]]:
    """KL(equilibrium || policy) at the iterations shown, of both, eta = 2 beta."""

    def policies(halves: int, count: int) -> list[torch.Tensor]:
        return list(islice(mirror_prox(BEATS, REFERENCE, beta, 2 * beta, halves), count))

    rest = policies(2, round(60 / beta))[-1]
    found = {}
    for name, halves in (("mirror prox", 2), ("mirror descent", 1)):
        every = policies(halves, SHOWN[-1] + 1)
        found[name] = [float((rest * (rest / every[k]).log()).sum()) for k in SHOWN]
    return found


def main() -> None:
    beta = float(sys.argv[1]) if len(sys.argv) > 1 else 0.02
    for name, apart in distances(beta).items():
        print(f"\n{name}, beta {beta}\n  iteration  KL(equilibrium || policy)")
        for k, kl in zip(SHOWN, apart):
            print(f"  {k:9}  {max(kl, 0.0):.6f}")
    prox = mirror_prox(BEATS, REFERENCE, beta, 2 * beta)
    rest = list(islice(prox, round(60 / beta)))[-1]
    print("\nequilibrium:", ", ".join(f"{a} {p:.3f}" for a, p in zip(ANSWERS, rest.tolist())))


if __name__ == "__main__":
    main()
