"""Assembles runs, one file for each kind of job."""
