"""Finds out how good a finished backbone is, in the published protocols; knows nothing of how it was trained."""
