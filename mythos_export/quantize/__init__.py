"""Quantizes bundles: recipes, calibration, algorithms, and the graph that runs the result."""

from mythos_export.quantize.bundle import quantize_bundle

__all__ = ["quantize_bundle"]
