"""Hypernetworks: their computation, storage and training. `editkit.editors.mend` uses MEND's,
`editkit.editors.malmen` that of MALMEN and RLEdit.
"""
