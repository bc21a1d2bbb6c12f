"""The training loop: the order of a step, the learning rate, what happens between steps. No foreign library here."""
