"""Evidence: evaluate, measure, sweep, compare."""
