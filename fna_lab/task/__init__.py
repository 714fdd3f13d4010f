"""Tasks: what a patched model is put to. LightningModules with steps and metrics, no maths."""
