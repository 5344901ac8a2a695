"""`editkit train`: an editor that has to learn first. The learning itself is
`editkit.hypernet.learner`; here are its files.
"""
