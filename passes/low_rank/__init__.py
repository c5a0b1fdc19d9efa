"""Low-rank approximation: one pass; its maths, its ways to write a layer as two, and its choice of ranks beside it."""

from slim.passes.low_rank.low_rank import LowRank as LowRank
