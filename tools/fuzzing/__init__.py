"""What `tools/fuzz.py` tries: a module for each kind of target, and the judge of a case.

Cases are drawn by a target's place among all: a new target goes to the end of `fuzz.all_targets`, so that the
cases of the others stay what they were.
"""
