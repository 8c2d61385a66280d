"""Talking to a model, or to two side by side: in the terminal, or in a page."""
