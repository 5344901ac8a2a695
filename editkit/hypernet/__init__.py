"""MEND's hypernetwork: what it computes, how it is stored, how it is trained. The editor that uses
it is `editkit.editors.mend`.
"""
