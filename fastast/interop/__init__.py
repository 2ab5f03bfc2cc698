"""Other projects' weights in our models."""

from fastast.interop.reference import from_reference, to_reference

__all__ = ["from_reference", "to_reference"]
