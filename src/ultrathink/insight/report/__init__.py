"""The page that explains a run: gathered from its files, written as one HTML file."""
