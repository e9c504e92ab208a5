"""Side-by-side measurement: our collectives, other libraries and the floor, case by case in one run."""
