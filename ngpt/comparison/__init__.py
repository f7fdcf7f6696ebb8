"""Comparisons: arms checked against each other, their runs one after the other, and what can be said of the difference."""
