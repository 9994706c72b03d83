"""memserve: context caching and disaggregated inference on an elastic memory pool (arXiv 2406.17565)."""

__version__ = "0.1.0"
