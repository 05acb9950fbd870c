import os

# The models of the tests are tiny: a second thread gains nothing, and where other processes use
# the cores, threads that wait for each other make a run ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
