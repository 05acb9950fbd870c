"""The policy that acts on a run: evidence, proposals, decisions, interventions, outcomes."""
