"""MEND's hypernetwork: its computation, storage and training. The editor `editkit.editors.mend`
uses it.
"""
