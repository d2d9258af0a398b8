"""Finishing a move: nothing carries the old store's values any more."""
