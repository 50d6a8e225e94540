"""What surrounds the core and is never imported by it.

The drawn scenes, the training of tiny/, the experiments.
"""
