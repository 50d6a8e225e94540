"""Not in the paper: merging once more behind the projector, where the decoder reads.

For who wants fewer tokens than the encoder can lose. What costs answers is that merging inside the
encoder changes what it computes (RESULTS.md). So it merges gently there, and this merges the rest
among all rows of a picture, its tiles too, or of a video, its frames too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dymu import at_least_float32, merge

BLOCK = 1024  # rows of A that are compared with B at once


@dataclass(frozen=True)
class second_stage:  # noqa: N801  it is used like a function: DyMU(after=second_stage(0.85))
    """tau: rows that are more alike than this, by their cosine, become one."""

    tau: float

    def __call__(self, x: Tensor, token_at: Tensor) -> tuple[Tensor, Tensor]:
        """x (R, D), token_at (N,) -> the same with fewer rows

        Rounds of the encoder's matching: A and B are every second row, and Eq. 1 averages by size,
        so what merged may merge again. Where that finds no pair above tau, A and B are the first
        half and the second: of frames with an even number of rows the same ones would never meet.
        """
        size = torch.bincount(token_at, minlength=len(x)).to(at_least_float32(x).dtype)
        rows = x, size, token_at
        while len(rows[0]) > 1:
            found = self.once(*rows) or self.once(*riffle(*rows))
            if not found:
                break
            rows = found
        return rows[0], rows[2]

    def once(self, x: Tensor, size: Tensor, token_at: Tensor):
        """Merges the pairs above tau; None if there are none"""
        score, partner = most_alike(x)
        chosen = score > self.tau
        return merge(x, size, token_at, partner, chosen) if chosen.any() else None


def most_alike(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `match` of the cosine, without a class token, but never R x R numbers at once

    x (R, D) -> score (|A|,), partner (|A|,), an index into B
    """
    unit = F.normalize(at_least_float32(x), dim=-1)
    found = [(a @ unit[1::2].T).clamp(max=1).max(dim=-1) for a in unit[::2].split(BLOCK)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def riffle(x: Tensor, size: Tensor, token_at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of the rows and the second in turns, as cards are shuffled"""
    comes_from = torch.empty(len(x), dtype=torch.long, device=x.device)
    comes_from[::2], comes_from[1::2] = torch.arange(len(x), device=x.device).chunk(2)
    return x[comes_from], size[comes_from], comes_from.argsort()[token_at]
