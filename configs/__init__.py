"""One file a model, with get_config(arg); every model has the variant smoke."""
