"""Sekisho on the workstation. Importing this package costs nothing and starts nothing."""

__version__ = "0.1.0"
