"""Certificates of a run's numbers: written, verified, and collected in a leaderboard."""
