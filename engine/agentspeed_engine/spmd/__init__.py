"""Local SPMD: modules declare placements, a pure planner inserts the collectives, nothing of it is left at run time."""
