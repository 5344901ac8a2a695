"""Many runs from one command: planned, launched, watched."""
