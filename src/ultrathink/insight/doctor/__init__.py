"""Is this machine fine, how fast is it, what will ``auto`` take here, and what is missing."""
