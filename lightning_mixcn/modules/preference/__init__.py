"""Preference optimisation of a mixture."""

from .module import PreferenceModule

__all__ = ["PreferenceModule"]
