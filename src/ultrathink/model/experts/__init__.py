"""Mixture of experts: routing, balancing, and the experts' products."""
