"""polar_deploy: train a CNN once with polarized gates, cut it exactly, build an engine, prove it is as good."""

__version__ = "0.1.0"
