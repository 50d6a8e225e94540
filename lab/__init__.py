"""What surrounds the core and is never imported by it: the drawn scenes, the training of tiny/, the experiments."""
