"""Datasets by name, and the interface that makes loaders of them."""

from data.data_interface import DInterface

__all__ = ["DInterface"]
