"""What a training step really costs on the machine at hand: its speed, where every instant of it went, its peers."""
