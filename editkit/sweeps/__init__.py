"""Sweeps: many runs from one command, planned, launched and summarized."""
