"""Published findings on token anatomy, each as a measurement and a verdict on any backbone."""
