"""Frank-Wolfe training against its rivals on real data, every arm pruned once to every ratio with no retraining."""
