"""Evaluators, a file for each type."""
