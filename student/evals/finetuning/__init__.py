"""Fine-tuning a whole encoder with a classifier: settings of the papers, layer decay, the loop."""
