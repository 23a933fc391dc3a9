"""SDXL in four steps, served by Cog: requests, weights, batching and the pipeline behind `predict.py`."""

__version__ = "0.1.0"
