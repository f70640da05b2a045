"""Spectra from products alone."""

from .lanczos import RitzPairs, lanczos

__all__ = ["RitzPairs", "lanczos"]
