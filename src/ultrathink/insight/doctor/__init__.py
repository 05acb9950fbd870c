"""What the machine has, how fast it is, what ``auto`` chooses on it, and what is missing."""
