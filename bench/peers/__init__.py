"""What is measured, each in an interpreter of its own: scripts that import nothing of ours but `wire`, and themselves.

They are run by their path, so that a peer's environment needs no TandemRT in it.
"""
