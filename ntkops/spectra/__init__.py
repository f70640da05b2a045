"""Spectra from products alone."""

from .lanczos import Lanczos, RitzPairs

__all__ = ["Lanczos", "RitzPairs"]
