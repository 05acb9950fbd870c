"""One file for each kind of job: how a run of that kind is put together."""
