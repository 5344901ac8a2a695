"""`editkit train`: the training of an editor's hypernetwork as a session with files. The learning
itself is `editkit.hypernet.learning`.
"""
