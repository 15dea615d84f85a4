"""The report of a run: one page that holds all of it, written at the end of training and by `launch.explain`."""
