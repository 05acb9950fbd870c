"""The policy that intervenes in a run: evidence, proposals, decisions, outcomes."""
