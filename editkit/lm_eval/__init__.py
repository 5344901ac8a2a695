"""lm-evaluation-harness from outside, on the model of a run: `python -m editkit.lm_eval`."""
