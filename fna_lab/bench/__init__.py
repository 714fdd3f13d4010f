"""How fast every variant is against the fused exact kernel: `python -m fna_lab.bench`."""
