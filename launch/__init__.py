"""The mains: `python -m launch.train` and its kin; nothing else in the project knows command-line flags."""

import time

STARTED = time.perf_counter()  # this is the first line of ours that runs, so start-up times count from here
