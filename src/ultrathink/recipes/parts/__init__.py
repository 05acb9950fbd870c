"""Parts shared by recipes."""
