"""Tests mirror the modules; `python -m pytest` runs them all."""
