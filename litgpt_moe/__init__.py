"""Pretrain small Mixture-of-Experts language models with LitGPT's own training loop."""

__version__ = "0.2.0"
