"""Tickets against their rivals on real data: one cell an arm and a seed, one committed JSON a cell, resumable."""
