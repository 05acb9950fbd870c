"""What people read about runs: logs, reports, comparisons, and the state of this machine."""
