"""Nets by name, and the interface that trains them."""

from model.model_interface import MInterface

__all__ = ["MInterface"]
