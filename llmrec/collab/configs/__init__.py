"""Settings of the sequence models, one file a model. Imports no torch."""
