"""Our tasks for lm-evaluation-harness: yamls that `lm_eval --include_path` takes as they are, their
data and how they are scored.
"""
