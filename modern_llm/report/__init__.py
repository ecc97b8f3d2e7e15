"""Run folders to one self-contained HTML page; plain results to a terminal. Imports nothing of the
project: what it reads is on the disk, in the form that the design promises."""
