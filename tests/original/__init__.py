"""Our numbers beside those recorded from the original implementation; benchmarks/fidelity.py prints them too."""
