"""For user code that every process runs, and only the first is to do something; the names are Lightning's."""

from engine.distributed import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]
