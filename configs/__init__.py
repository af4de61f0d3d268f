"""One file a model; each has get_config(arg) and takes the variant smoke."""
