"""From a trained run to the model in production: the gate, the model it replaces, the export and its proof."""
