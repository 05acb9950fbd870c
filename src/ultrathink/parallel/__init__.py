"""Several processes, one run: who takes part, and what each holds of the model."""
